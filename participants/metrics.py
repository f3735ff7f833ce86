"""What Prometheus reads of a participant's server. One registry per server, so that many fit into one process."""

import logging
from collections.abc import Callable
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

_ALARM: Final = "ALARM:"


class Metrics:
    """Counters of one server; gauges ask when they are read."""

    def __init__(
        self,
        *,
        prepared: Callable[[], float],
        oldest_s: Callable[[], float],
        working: Callable[[], float],
        waiting: Callable[[], float],
    ) -> None:
        self.registry = CollectorRegistry()
        for name, text, read in (
            ("prepared", "Branches that are prepared and wait for their decision", prepared),
            ("prepared_oldest_seconds", "For how long the oldest of them has been prepared; 0 without any", oldest_s),
            ("working", "Messages that the resource manager works on", working),
            ("waiting", "Messages that wait for it", waiting),
        ):
            Gauge(f"outlast_participant_{name}", text, registry=self.registry).set_function(read)
        self._sweeps = Counter(
            "outlast_participant_sweeps",
            "Looks for prepared branches that nobody here has heard of",
            ["result"],
            registry=self.registry,
        )
        self._listed = self._sweeps.labels("listed")
        self._failed = self._sweeps.labels("failed")
        self._alarms = Counter(
            "outlast_participant_alarms", "Lines of this process's log that say ALARM", registry=self.registry
        )
        self._listener = _Listener(self._alarms)

    def swept(self, *, failed: bool) -> None:
        """A sweep has listed what is prepared, or could not."""
        (self._failed if failed else self._listed).inc()

    def listen(self) -> None:
        """Count alarms from now on."""
        logging.getLogger(__package__).addHandler(self._listener)

    def close(self) -> None:
        """Count them no more."""
        logging.getLogger(__package__).removeHandler(self._listener)

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)


class _Listener(logging.Handler):
    """Alarms are raised in many places, and each of them is a line in the log: that is where they are counted."""

    def __init__(self, alarms: Counter) -> None:
        super().__init__(logging.ERROR)
        self._alarms = alarms

    def emit(self, record: logging.LogRecord) -> None:
        """Count it if it is one."""
        if _ALARM in record.getMessage():
            self._alarms.inc()
