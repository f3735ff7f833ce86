"""A snapshot handed over: how a node is caught up whose log ends where its leader's no longer begins.

    leader    -> follower   snapshot_piece  (index, entry_term, size, offset, data)
    follower  -> leader     snapshot_got    (index, offset, done)

One piece is under way at a time. The follower answers with the offset that it wants next, so a transfer that was cut
off goes on where it stopped, and one that the follower knows nothing about begins at 0. When all has come it is
verified, synced and renamed; the state is decoded beside the event loop and put in place; the log becomes the one entry
that the snapshot ends with; and only when that is durable does the follower say "done" (`holdback.py`), which the
leader counts like an acknowledgement.

A leader that hears nothing sends the same piece again after a while; one that is deposed stops, and so does one whose
peer is gone. A follower forgets what it has of one leader's snapshot when another speaks to it.

`send` may lose what it is given. Work on files is done on an executor's thread; what it brings comes back to the loop.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from cluster.replication.clock import Clock
from cluster.replication.disk import NO_ROOM, File
from cluster.replication.guard import Message
from cluster.replication.snapshot import Snapshot, SnapshotBroken, Snapshots

_log = logging.getLogger(__name__)


class Owner(Protocol):
    """Whom a `CatchUp` works for."""

    def decode(self, pieces: Iterable[bytes]) -> Callable[[], object]:
        """Make a state of a snapshot's pieces, on any thread; what is returned puts it in place."""
        ...

    def install(self, snapshot: Snapshot, put: Callable[[], object]) -> object:
        """The state is this one now, unless it is older than what this node has. Returns what it replaces."""
        ...

    def caught_up(self, peer: str, index: int) -> None:
        """This follower holds the log up to `index`."""
        ...

    def failed(self, error: BaseException) -> None:
        """The node must stop."""
        ...


@dataclass(slots=True, kw_only=True, eq=False)
class _Sending:
    """To one follower. `file` is None while it is being opened."""

    snapshot: Snapshot | None = None
    file: File | None = None
    offset: int = 0
    since_s: float = 0.0
    busy: bool = True
    """A thread is at it."""
    repeated: bool = False
    """The last piece was sent again: the follower may want another, even an earlier one."""


@dataclass(slots=True, kw_only=True, eq=False)
class _Incoming:
    """From one leader in one term."""

    source: tuple[str, int, int]
    """The leader, its term, and the snapshot's last entry."""
    file: File | None = None
    offset: int = 0
    busy: bool = False
    since_s: float = field(default=0.0)


class CatchUp:
    """Both ends of it, on one node. All methods belong to the event loop's thread."""

    def __init__(
        self,
        *,
        snapshots: Snapshots,
        owner: Owner,
        send: Callable[[str, Message], object],
        clock: Clock,
        piece_bytes: int,
        repeat_s: float,
    ) -> None:
        self._snapshots = snapshots
        self._owner = owner
        self._send = send
        self._clock = clock
        self._piece_bytes = piece_bytes
        self._repeat_s = repeat_s
        self._sending: dict[str, _Sending] = {}
        self._incoming: _Incoming | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._over = False

    # The leader's end.

    def needed(self, peer: str, term: int) -> None:
        """This follower needs a snapshot: begin, or go on, or say it again if nothing was heard for long."""
        sending = self._sending.get(peer)
        if sending is None:
            sending = self._sending[peer] = _Sending(since_s=self._clock.monotonic_s())
            self._spawn(self._begin(peer, term, sending))
        elif not sending.busy and self._clock.monotonic_s() - sending.since_s > self._repeat_s:
            sending.repeated = True
            self._say_piece(peer, term, sending)

    def got(self, peer: str, term: int, message: Message) -> None:
        """The follower's answer."""
        sending = self._sending.get(peer)
        if sending is None or sending.snapshot is None or sending.snapshot.index != message["index"]:
            return
        if message["done"]:
            self.forget(peer)
            self._owner.caught_up(peer, message["index"])
            return
        # An answer that comes twice, or late, must not set off a second train of pieces beside the first.
        goes_on = message["offset"] > sending.offset or (sending.repeated and message["offset"] != sending.offset)
        if goes_on and not sending.busy and message["offset"] < sending.snapshot.size:
            sending.repeated = False
            sending.offset = message["offset"]
            self._say_piece(peer, term, sending)

    def forget(self, peer: str) -> None:
        """Send this one no more."""
        sending = self._sending.pop(peer, None)
        if sending is not None and sending.file is not None and not sending.busy:
            sending.file.close()

    def lead_no_more(self) -> None:
        """Send nobody anything more."""
        for peer in list(self._sending):
            self.forget(peer)

    async def _begin(self, peer: str, term: int, sending: _Sending) -> None:
        def opened() -> tuple[Snapshot, File] | None:
            indices = self._snapshots.indices()
            return self._snapshots.open(indices[0]) if indices else None

        found = await _on_thread(opened)
        if found is None:
            _log.error("%s needs a snapshot, and there is none", peer)
            self._sending.pop(peer, None)
            return
        sending.snapshot, sending.file = found
        _log.info("%s is caught up by the snapshot of entry %d, %d bytes", peer, found[0].index, found[0].size)
        await self._say(peer, term, sending)

    def _say_piece(self, peer: str, term: int, sending: _Sending) -> None:
        sending.busy = True
        self._spawn(self._say(peer, term, sending))

    async def _say(self, peer: str, term: int, sending: _Sending) -> None:
        snapshot, file, offset = sending.snapshot, sending.file, sending.offset
        assert snapshot is not None
        assert file is not None
        data = await _on_thread(lambda: file.read(offset, self._piece_bytes))
        sending.busy = False
        if self._sending.get(peer) is not sending or self._over:
            file.close()
            return
        sending.since_s = self._clock.monotonic_s()
        self._send(
            peer,
            {
                "type": "snapshot_piece",
                "term": term,
                "index": snapshot.index,
                "entry_term": snapshot.term,
                "size": snapshot.size,
                "offset": offset,
                "data": data,
            },
        )

    # The follower's end.

    def piece(self, peer: str, message: Message) -> None:
        """One has come, of the leader of this node's term."""
        source = (peer, message["term"], message["index"])
        incoming = self._incoming
        if incoming is None or incoming.source != source:
            if incoming is not None and incoming.busy:
                return  # it will be sent again
            self._drop_incoming()
            incoming = self._incoming = _Incoming(source=source)
        if incoming.busy:
            return
        if message["offset"] != incoming.offset:
            self._say_got(incoming)
            return
        incoming.busy = True
        self._spawn(self._take(incoming, message))

    async def _take(self, incoming: _Incoming, message: Message) -> None:
        try:
            if incoming.file is None:
                incoming.file = await _on_thread(self._snapshots.begin_incoming)
            file, data = incoming.file, message["data"]
            await _on_thread(lambda: file.write(incoming.offset, data))
            incoming.offset += len(data)
            if incoming.offset >= message["size"]:
                await self._finish(incoming, file)
                return
        except SnapshotBroken as error:
            _log.error("a snapshot from %s will not do: %s", incoming.source[0], error)
            incoming.busy = False
            self._drop_incoming()
            return
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            _log.error("no room for a snapshot from %s: %s", incoming.source[0], error)
            incoming.busy = False
            self._drop_incoming()
            return
        incoming.busy = False
        self._say_got(incoming)

    async def _finish(self, incoming: _Incoming, file: File) -> None:
        def kept() -> tuple[Snapshot, Callable[[], object]]:
            snapshot = self._snapshots.finish_incoming(file)
            return snapshot, self._owner.decode(self._snapshots.read(snapshot.index)[1])

        snapshot, put = await _on_thread(kept)
        incoming.busy = False
        self._drop_incoming()
        if self._over:
            return
        replaced = [self._owner.install(snapshot, put)]
        peer, _term, index = incoming.source
        self._send(peer, {"type": "snapshot_got", "index": index, "offset": snapshot.size, "done": True})
        # Letting go of a million rows takes time, and the loop has none.
        await _on_thread(replaced.clear)

    def _say_got(self, incoming: _Incoming) -> None:
        peer, _term, index = incoming.source
        self._send(peer, {"type": "snapshot_got", "index": index, "offset": incoming.offset, "done": False})

    def _drop_incoming(self) -> None:
        incoming, self._incoming = self._incoming, None
        if incoming is not None and incoming.file is not None:
            incoming.file.close()

    # Both.

    async def stop(self) -> None:
        """Finish what threads do, and nothing more."""
        self._over = True
        if self._tasks:
            await asyncio.wait(set(self._tasks))
        self.lead_no_more()
        self._drop_incoming()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        if self._over:
            work.close()
            return
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = task.exception()
        if error is not None and not self._over:
            self._owner.failed(error)


async def _on_thread(work: Callable[[], Any]) -> Any:
    return await asyncio.get_running_loop().run_in_executor(None, work)
