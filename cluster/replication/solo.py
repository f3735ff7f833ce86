"""One coordinator, a durable log and no replication: what a coordinator without Raft would be.

Commands go to one file, each with its length and checksum, and are applied only once they are on disk. One sync covers
all that waited for it (group commit), on a thread of its own: a disk that stalls must not stop the event loop.

After a crash the file may end in a record that was never synced, so that nobody was told of it: it is cut off, with a
line in the log. A failed write or sync stops the node: nobody knows what the disk holds then.
"""

import asyncio
import contextlib
import logging
import os
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cluster.replication.log import MAX_COMMAND_BYTES, CannotStart, Leadership, OnFatal, StateMachine
from cluster.replication.memory import MemoryLog, Waiting, abandon
from cluster.replication.term import TermFile, sync_folder

_log = logging.getLogger(__name__)

_HEADER = b"outlast solo log 1\n"
_FRAME = struct.Struct("<II")  # length of the command, CRC-32 of the length and of it
_REPLAYED_PER_TURN = 1000


class SoloLogBroken(CannotStart):
    """The file is not one of ours. Names the file."""


class SoloLog(MemoryLog):
    """A `MemoryLog` whose commands are on disk, in `folder`, before they are applied.

    `start` replays them all. The term is one more at every start.
    """

    def __init__(
        self,
        folder: Path,
        node: str = "n1",
        *,
        max_command_bytes: int = MAX_COMMAND_BYTES,
        proposals_max: int = 100_000,
        on_fatal: OnFatal | None = None,
        understands: int = 1,
    ) -> None:
        super().__init__(
            node,
            max_command_bytes=max_command_bytes,
            proposals_max=proposals_max,
            on_fatal=on_fatal,
            understands=understands,
        )
        self._folder = folder
        self._handle: int | None = None
        self._disk: ThreadPoolExecutor | None = None
        self._syncing: asyncio.Future[None] | None = None

    async def start(self, machine: StateMachine, on_leadership: Callable[[Leadership], None]) -> None:
        """Replay the file, begin a new term, and lead. Raises OSError, `SoloLogBroken`, `TermFileBroken`."""
        loop = asyncio.get_running_loop()
        self._disk = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"{self._node}-disk")
        commands = await loop.run_in_executor(self._disk, self._open)
        for number, command in enumerate(commands, start=1):
            machine.apply(command)
            if number % _REPLAYED_PER_TURN == 0:
                await asyncio.sleep(0)
        await super().start(machine, on_leadership)

    async def stop(self) -> None:
        """Finish the sync that runs, and release the file. What still waits ends in `ProposalUnknown`."""
        waiting, self._waiting = self._waiting, []
        abandon(waiting, "the node was stopped")
        if self._syncing is not None:
            await asyncio.wait([self._syncing])
            # The one who waits for the sync is told in a callback of its own; let it apply before the end is told.
            await asyncio.sleep(0)
        await super().stop()
        if self._disk is not None:
            self._disk.shutdown()
            self._disk = None
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _work(self) -> None:
        self._woken = False
        if self._syncing is not None or not self._waiting or self._disk is None:
            return  # what waits goes with the next sync
        batch, self._waiting = self._waiting, []
        frames = b"".join(_framed(command) for command, _future in batch)
        self._syncing = asyncio.get_running_loop().run_in_executor(self._disk, self._write, frames)
        self._syncing.add_done_callback(lambda done: self._synced(done, batch))

    def _synced(self, done: asyncio.Future[None], batch: Waiting) -> None:
        self._syncing = None
        error = done.exception()
        if error is not None:
            _log.critical("%s: writing the log failed; this node must stop", self._node, exc_info=error)
            abandon(batch, "the disk failed")
            self._fail(error)
            return
        self._apply(batch)
        self._work()

    def _open(self) -> list[bytes]:
        """On the disk's thread: read all commands, cut a torn tail off, and store the new term."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / "commands.log"
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, handle)
            with open(handle, "rb", closefd=False) as file:
                content = file.read()
            if content and not _HEADER.startswith(content[: len(_HEADER)]):
                raise SoloLogBroken(f"{path}: not a log of commands")
            commands, end = _parse(content)
            if end < len(content):
                _log.warning("%s: cut off a torn tail of %d bytes after %d", path, len(content) - end, end)
                os.ftruncate(handle, end)
            if end == 0:
                _write_all(handle, _HEADER)
            os.fsync(handle)
            sync_folder(self._folder)
            terms = TermFile(self._folder / "term.json")
            self._term = terms.load()[0] + 1
            terms.store(self._term, self._node)
            undo.pop_all()
        self._handle = handle
        return commands

    def _write(self, frames: bytes) -> None:
        """On the disk's thread: all frames, and one sync for them."""
        assert self._handle is not None
        _write_all(self._handle, frames)
        os.fdatasync(self._handle)


def _write_all(handle: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(handle, rest) :]


def _framed(command: bytes) -> bytes:
    return _FRAME.pack(len(command), _checksum(command)) + command


def _checksum(command: bytes) -> int:
    # Over the length too: a tail of zeros would otherwise read as empty commands.
    return zlib.crc32(command, zlib.crc32(len(command).to_bytes(4, "little")))


def _parse(content: bytes) -> tuple[list[bytes], int]:
    """All whole commands, and where the last of them ends (0: not even the header is whole)."""
    commands: list[bytes] = []
    position = len(_HEADER)
    if len(content) < position:
        return commands, 0
    while position + _FRAME.size <= len(content):
        length, checksum = _FRAME.unpack_from(content, position)
        command = content[position + _FRAME.size : position + _FRAME.size + length]
        if len(command) < length or _checksum(command) != checksum:
            break
        commands.append(command)
        position += _FRAME.size + length
    return commands, position
