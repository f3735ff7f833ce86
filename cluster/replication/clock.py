"""Where time comes from: real in production, virtual in simulation."""

import time
from typing import Protocol


class Clock(Protocol):
    """Two readings. Durations are taken from `monotonic_s`, dates shown to people from `wall_ms`."""

    def monotonic_s(self) -> float:
        """Seconds from an arbitrary origin; never goes back."""
        ...

    def wall_ms(self) -> int:
        """Milliseconds since 1970 (UTC); may jump either way."""
        ...


class SystemClock:
    """The machine's own clocks."""

    def monotonic_s(self) -> float:
        """Read CLOCK_MONOTONIC."""
        return time.monotonic()

    def wall_ms(self) -> int:
        """Read CLOCK_REALTIME."""
        return time.time_ns() // 1_000_000
