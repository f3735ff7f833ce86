"""Every implementation of `ReplicatedLog`, behind one handle for the contract's tests."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path

from cluster.replication.log import Leadership, NotProposed, ReplicatedLog
from cluster.replication.memory import MemoryLog
from cluster.replication.raft_journal import file_journal
from cluster.replication.raft_log import RaftLog
from cluster.replication.settings import RaftSettings
from cluster.replication.solo import SoloLog
from cluster.replication.transport import SocketTransport

MAX_COMMAND_BYTES = 64 * 1024
POISON = b"poison"
LIMIT_S = 20.0


async def until(condition: Callable[[], object], what: str = "") -> None:
    """Wait for a condition."""
    try:
        async with asyncio.timeout(LIMIT_S):
            while not condition():  # noqa: ASYNC110 - conditions of the outside have no event
                await asyncio.sleep(0.002)
    except TimeoutError:
        raise AssertionError(f"not within {LIMIT_S} s: {what or condition}") from None


class Recorder:
    """A state machine that remembers; `POISON` makes it raise, as no state machine may."""

    def __init__(self) -> None:
        self.commands: list[bytes] = []
        self.restored = 0

    def apply(self, command: bytes) -> object:
        if command == POISON:
            raise ZeroDivisionError("poisoned")
        self.commands.append(command)
        return command[::-1]

    def snapshot(self) -> Callable[[], Iterator[bytes]]:
        frozen = list(self.commands)

        def encode() -> Iterator[bytes]:
            yield b"%d" % len(frozen)
            yield from (command + b"." for command in frozen)

        return encode

    def restore(self, pieces: Iterable[bytes]) -> Callable[[], object]:
        count, *commands = [bytes(piece) for piece in pieces]
        assert len(commands) == int(count)

        def put() -> object:
            replaced, self.commands = self.commands, [command[:-1] for command in commands]
            self.restored += 1
            return replaced

        return put


class World:
    """One or more nodes of one log."""

    nodes: tuple[str, ...] = ("n1",)

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.logs: dict[str, ReplicatedLog] = {}
        self.machines: dict[str, Recorder] = {}
        self.told: dict[str, list[Leadership]] = {}
        self.fatal: list[BaseException] = []
        self.understand = {"n1": 4, "n2": 3}
        """What nodes announce, from their next start on; others announce 1."""

    def make(self, node: str) -> ReplicatedLog:
        raise NotImplementedError

    async def start(self, *nodes: str) -> None:
        for node in nodes or self.nodes:
            log, machine, told = self.make(node), Recorder(), []
            self.told[node] = told
            await log.start(machine, told.append)
            self.logs[node], self.machines[node] = log, machine

    async def stop(self, *nodes: str) -> None:
        for node in nodes or tuple(self.logs):
            await self.logs.pop(node).stop()

    async def leader(self) -> str:
        """The one who leads the highest term."""

        def leading() -> list[tuple[int, str]]:
            states = [(node, log.leadership()) for node, log in self.logs.items()]
            return [(state.term, node) for node, state in states if state.is_leader]

        await until(leading, "a leader")
        return max(leading())[1]

    async def commit(self, command: bytes) -> object:
        """Propose to whoever leads, until it is taken."""
        async with asyncio.timeout(LIMIT_S):
            while True:
                with contextlib.suppress(NotProposed):
                    return await self.logs[await self.leader()].propose(command)
                await asyncio.sleep(0.002)


class MemoryWorld(World):
    def make(self, node: str) -> ReplicatedLog:
        return MemoryLog(
            node,
            max_command_bytes=MAX_COMMAND_BYTES,
            on_fatal=self.fatal.append,
            understands=self.understand.get(node, 1),
        )


class SoloWorld(World):
    def make(self, node: str) -> ReplicatedLog:
        return SoloLog(
            self.folder / node,
            node,
            max_command_bytes=MAX_COMMAND_BYTES,
            on_fatal=self.fatal.append,
            understands=self.understand.get(node, 1),
        )


class RaftWorld(World):
    nodes = ("n1", "n2", "n3")
    settings = RaftSettings(max_command_bytes=MAX_COMMAND_BYTES, leader_fallback_s=0.6, proposal_timeout_s=1.5)

    def __init__(self, folder: Path, addresses: dict[str, tuple[str, int]]) -> None:
        super().__init__(folder)
        self.addresses = addresses

    def make(self, node: str) -> RaftLog:
        return RaftLog(
            node=node,
            peers=[other for other in self.nodes if other != node],
            transport=SocketTransport(
                node=node, addresses=self.addresses, cluster="contract", secret=b"a secret of the contract"
            ),
            journal=file_journal(self.folder / node),
            settings=self.settings,
            on_fatal=self.fatal.append,
            understands=self.understand.get(node, 1),
        )


@contextlib.contextmanager
def reserved_addresses(*nodes: str) -> Iterator[dict[str, tuple[str, int]]]:
    """Free loopback ports that stay ours: bound, not listening, so that connecting to them is refused."""
    with contextlib.ExitStack() as stack:
        addresses = {}
        for node in nodes:
            holder = stack.enter_context(socket.socket())
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            holder.bind(("127.0.0.1", 0))
            addresses[node] = holder.getsockname()
        yield addresses


@contextlib.asynccontextmanager
async def world_of(kind: str, folder: Path) -> AsyncIterator[World]:
    """A world whose nodes all run, and are stopped in the end."""
    with reserved_addresses(*RaftWorld.nodes) as addresses:
        world = {
            "memory": lambda: MemoryWorld(folder),
            "solo": lambda: SoloWorld(folder),
            "raft": lambda: RaftWorld(folder, addresses),
        }[kind]()
        try:
            await world.start()
            yield world
        finally:
            await world.stop()
