"""When a snapshot is taken, and from where on the log is kept then.

One is due when as many bytes have been applied as the last one took (`snapshot_log_bytes` at least), or
`snapshot_log_entries` entries. The state is frozen on the event loop, and encoded and written on a thread. When it is
durable, the log begins at the snapshot *before* it: see `snapshot.py`.
"""

import asyncio
import logging
from collections.abc import Callable

from cluster.replication.clock import Clock
from cluster.replication.disk import NO_ROOM
from cluster.replication.log import StateMachine
from cluster.replication.raft import Replica
from cluster.replication.settings import RaftSettings
from cluster.replication.snapshot import Snapshot, Snapshots

_log = logging.getLogger(__name__)


class Compaction:
    """One node's snapshots of its own state. Belongs to the event loop's thread."""

    def __init__(
        self,
        *,
        node: str,
        replica: Replica,
        machine: StateMachine,
        snapshots: Snapshots,
        newest: Snapshot | None,
        failed: Callable[[BaseException], None],
        settings: RaftSettings,
        clock: Clock,
    ) -> None:
        self._node = node
        self._replica = replica
        self._machine = machine
        self._snapshots = snapshots
        self._newest = newest
        """Whether taken here or received."""
        self._failed = failed
        self._settings = settings
        self._clock = clock
        self._next_s = 0.0
        self._over = False
        self.task: asyncio.Task[None] | None = None
        """What is under way."""

    def take_if_due(self, now_s: float) -> None:
        """Begin a snapshot, if it is time."""
        replica, settings, last = self._replica, self._settings, self._newest
        if self.task is not None or now_s < self._next_s:
            return
        index, since = (0, settings.snapshot_log_bytes) if last is None else (last.index, last.size)
        if (
            replica.applied_bytes < max(settings.snapshot_log_bytes, since)
            and replica.applied_index - index < settings.snapshot_log_entries
        ) or replica.applied_index <= index:
            return
        replica.applied_bytes = 0
        self.task = asyncio.get_running_loop().create_task(self._take())
        self.task.add_done_callback(self._took)

    def installed(self, snapshot: Snapshot) -> None:
        """The state is this one now, received from a leader."""
        self._newest = snapshot

    def end(self) -> None:
        """Change nothing more; what is under way comes to nothing."""
        self._over = True

    async def _take(self) -> None:
        replica, snapshots = self._replica, self._snapshots
        index = replica.applied_index
        term = replica.term_at(index)
        assert term is not None
        frozen = [self._machine.snapshot()]

        def written() -> Snapshot:
            # It is let go of here: freeing a million rows takes time, and the loop has none.
            return snapshots.write(index, term, frozen.pop()())

        try:
            snapshot = await asyncio.get_running_loop().run_in_executor(None, written)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            _log.error("%s: no room for a snapshot: %s", self._node, error)
            self._next_s = self._clock.monotonic_s() + self._settings.snapshot_retry_s
            replica.applied_bytes += self._settings.snapshot_log_bytes
            return
        if self._over or (self._newest is not None and self._newest.index > snapshot.index):
            return
        _log.info("%s: a snapshot of entry %d, %d bytes", self._node, snapshot.index, snapshot.size)
        previous, self._newest = self._newest, snapshot
        if previous is not None:
            replica.compact(previous.index)

    def _took(self, task: asyncio.Task[None]) -> None:
        self.task = None
        error = task.exception()
        if error is not None:
            self._failed(error)
