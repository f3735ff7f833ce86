"""A clock that a test moves."""

import time


class FakeClock:
    """Real monotonic time, so that timers work, plus what a test adds; the wall is the test's own."""

    def __init__(self, wall_ms: int = 1_700_000_000_000) -> None:
        self.ahead_s = 0.0
        self._wall_ms = wall_ms

    def monotonic_s(self) -> float:
        return time.monotonic() + self.ahead_s

    def wall_ms(self) -> int:
        return self._wall_ms

    def pass_s(self, seconds: float) -> None:
        """Let `seconds` pass on both."""
        self.ahead_s += seconds
        self._wall_ms += int(seconds * 1000)
