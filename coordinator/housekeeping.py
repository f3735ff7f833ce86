"""What a leader does every while: it forgets what is old enough, and tells people which nodes are behind.

Forgetting goes in bounded pieces, one at a time, so that no node stops for long when one is applied.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from cluster.replication.clock import Clock
from cluster.replication.log import ReplicatedLog
from coordinator.config import NodeConfig
from coordinator.facts import Applied
from coordinator.ledger import Ledger
from coordinator.levels import OLDEST
from coordinator.metrics import Metrics
from coordinator.protocol.entries import Entry, Forgotten

_log = logging.getLogger(__name__)

FORGET_AT_ONCE: Final = 5_000
"""Transactions that one `Forgotten` removes at most."""

NEXT_PIECE_S: Final = 0.05
"""Before the next look, when there was more to forget than that."""


class Housekeeper:
    """Runs on every node, and forgets only where its node leads."""

    def __init__(
        self,
        *,
        config: NodeConfig,
        ledger: Ledger,
        log: ReplicatedLog,
        clock: Clock,
        metrics: Metrics,
        propose: Callable[[Entry, int], asyncio.Future[Applied]],
        leads: Callable[[], bool],
        may_forget: Callable[[], bool],
    ) -> None:
        self._limits = config.limits
        self._every_s = config.timing.housekeeping_s
        self._ledger = ledger
        self._log = log
        self._clock = clock
        self._metrics = metrics
        self._propose = propose
        self._leads = leads
        self._may_forget = may_forget
        self._forgetting = False
        self._behind: dict[str, int] = {}
        """Nodes that announce less than the cluster's level, as far as people were told."""
        self._restored_at = 0
        """When the restore was, or at the latest was, in milliseconds since 1970; 0 where there was none."""

    def step_down(self) -> None:
        """What was proposed is no business of the next reign."""
        self._forgetting = False

    def note_restore(self) -> None:
        """The state may be a restored one now. On every node: whoever leads next has to know."""
        if self._ledger.lost is not None:
            self._restored_at = self._ledger.lost.since
        elif self._ledger.epoch_base and not self._restored_at:
            # Its range is closed, and nothing else tells when it was: it may have been a moment ago.
            self._restored_at = self._clock.wall_ms()

    def round(self) -> float:
        """Do what is due; returns in how many seconds to look again."""
        pause_s = self._every_s
        if self._may_forget() and not self._forgetting and not self._keeps_all():
            pause_s = self._forget()
        if self._leads():
            self._warn_of_what_is_behind()
        self._metrics.retained.set(len(self._ledger))
        return pause_s

    def _forget(self) -> float:
        before = self._clock.wall_ms() - int(self._limits.retention_s * 1000)
        # At level 1 a floor never goes back; later, what is below it already goes in pieces as well.
        least = self._ledger.floor if self._ledger.level == OLDEST else -1
        floor, found = least, 0
        for number, _ in self._ledger.forgettable(before):
            floor = max(least, number)
            found += 1
            if found == FORGET_AT_ONCE:
                break
        if found:
            # One at a time: while the log is slow, another one would find the same again.
            self._forgetting = True
            self._propose(Forgotten(floor=floor, before=before), 50).add_done_callback(self._forgot)
        return NEXT_PIECE_S if found == FORGET_AT_ONCE else self._every_s

    def _forgot(self, done: asyncio.Future[Applied]) -> None:
        self._forgetting = False
        if not done.cancelled() and (error := done.exception()) is not None:
            _log.info("forgetting what has ended is tried again: %s", error)

    def _keeps_all(self) -> bool:
        """After a restore clients come back to ask what became of their requests, which are to be found if room is."""
        age_ms = self._clock.wall_ms() - self._restored_at
        return age_ms < self._limits.retention_s * 1000 and len(self._ledger) < self._limits.max_retained / 2

    def _warn_of_what_is_behind(self) -> None:
        """A node that came back with older software, or that is held back too late: people should look."""
        level = self._ledger.level
        behind = {node: known for node, known in self._log.understands().items() if known is not None and known < level}
        if behind != self._behind:
            for node, known in behind.items():
                _log.warning(
                    "%s announces level %d, and this cluster works at level %d, which is not taken back: its software "
                    "is too old, or its compatibility.highest_level is (docs/UPGRADES.md)",
                    node,
                    known,
                    level,
                )
        self._behind = behind
