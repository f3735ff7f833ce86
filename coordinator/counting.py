"""Counters and histograms that cost next to nothing while they count: what Prometheus reads is made when it asks.

Those of `prometheus_client` are safe in many threads, and take a lock for each number. A node counts in one thread.
"""

import time
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import INF, floatToGoString


class Count(Collector):
    """A counter for each of `values` of one label, or one without a label. Shown from the beginning, as 0."""

    def __init__(
        self,
        name: str,
        documentation: str,
        *,
        label: str | None = None,
        values: Sequence[str] = ("",),
        registry: CollectorRegistry,
    ) -> None:
        self._name, self._documentation, self._label = name, documentation, label
        self._counts = dict.fromkeys(values, 0)
        self._created_s = time.time()
        registry.register(self)

    def inc(self, value: str = "") -> None:
        """One more."""
        self._counts[value] += 1

    def collect(self) -> Iterable[Metric]:
        """What there is now."""
        family = CounterMetricFamily(self._name, self._documentation, labels=[self._label] if self._label else [])
        for value, count in self._counts.items():
            family.add_metric([value], count, created=self._created_s)
        yield family


class Spread(Collector):
    """A histogram. `bounds` ascend, and each belongs to what is below it."""

    def __init__(self, name: str, documentation: str, *, bounds: Sequence[float], registry: CollectorRegistry) -> None:
        self._name, self._documentation = name, documentation
        self._bounds = [*map(float, bounds), INF]
        self._counts = [0] * len(self._bounds)
        self._sum = 0.0
        self._created_s = time.time()
        registry.register(self)

    def observe(self, value: float) -> None:
        """Count one such."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def collect(self) -> Iterable[Metric]:
        """What there is now."""
        family = HistogramMetricFamily(self._name, self._documentation)
        names = map(floatToGoString, self._bounds)
        family.add_metric([], list(zip(names, accumulate(self._counts), strict=True)), self._sum)
        family.add_sample(f"{self._name}_created", {}, self._created_s)
        yield family
