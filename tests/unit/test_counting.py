"""What is counted here reads as if `prometheus_client` itself had counted it."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from coordinator.counting import Count, Spread

BOUNDS = (0.5, 1, 2)


def text(registry: CollectorRegistry) -> str:
    return re.sub(r"(_created\S*) 1\.\d+e\+09", r"\1 then", generate_latest(registry).decode())


@given(st.lists(st.integers(-1, 6).map(lambda halves: halves / 2)))
def test_a_spread_reads_as_a_histogram(values: list[float]) -> None:
    theirs, ours = CollectorRegistry(), CollectorRegistry()
    histogram = Histogram("h", "what", buckets=BOUNDS, registry=theirs)
    spread = Spread("h", "what", bounds=BOUNDS, registry=ours)
    for value in values:
        histogram.observe(value)
        spread.observe(value)
    assert text(ours) == text(theirs)
    assert f"h_count {len(values)}.0" in text(ours)


@given(st.lists(st.sampled_from(["yes", "no"])))
def test_a_count_reads_as_a_counter(values: list[str]) -> None:
    theirs, ours = CollectorRegistry(), CollectorRegistry()
    counter, labelled = Counter("c", "what", registry=theirs), Counter("d", "which", ["answer"], registry=theirs)
    count = Count("c", "what", registry=ours)
    counts = Count("d", "which", label="answer", values=("yes", "no"), registry=ours)
    for answer in ("yes", "no"):
        labelled.labels(answer)
    for value in values:
        counter.inc()
        labelled.labels(value).inc()
        count.inc()
        counts.inc(value)
    assert text(ours) == text(theirs)
    assert f"c_total {len(values)}.0" in text(ours)


def test_there_are_no_other_labels_than_those_named() -> None:
    with pytest.raises(KeyError):
        Count("c", "what", label="answer", values=("yes", "no"), registry=CollectorRegistry()).inc("perhaps")
