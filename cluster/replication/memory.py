"""A replicated log of one node: it always leads, and what is proposed is committed.

Tests use it where replication is not what they are about. `SoloLog` adds a file to it: the baseline that the replicated
log is measured against.
"""

import asyncio
import logging
from collections.abc import Callable

from cluster.replication.log import MAX_COMMAND_BYTES, Leadership, NotProposed, OnFatal, ProposalUnknown, StateMachine

_log = logging.getLogger(__name__)

Waiting = list[tuple[bytes, asyncio.Future[object]]]
"""Commands, and the futures of those who proposed them."""


class MemoryLog:
    """The `ReplicatedLog` protocol in one process, and gone with it.

    Commands are applied on the next turn of the event loop, all that wait in one go. `term` is the term that this node
    leads. `max_command_bytes` and `proposals_max` bound one command and the queue; what exceeds them is `NotProposed`.
    When `apply` raises, the log stops for good and tells `on_fatal`.
    """

    def __init__(
        self,
        node: str = "n1",
        *,
        term: int = 1,
        max_command_bytes: int = MAX_COMMAND_BYTES,
        proposals_max: int = 100_000,
        on_fatal: OnFatal | None = None,
        understands: int = 1,
    ) -> None:
        assert term >= 1
        assert max_command_bytes >= 1
        assert proposals_max >= 1
        self._node = node
        self._term = term
        self._max_command_bytes = max_command_bytes
        self._proposals_max = proposals_max
        self._on_fatal = on_fatal
        self._understands = understands
        self._leading = False
        self._machine: StateMachine | None = None
        self._on_leadership: Callable[[Leadership], None] | None = None
        self._waiting: Waiting = []
        self._woken = False

    @property
    def node(self) -> str:
        """This node's id."""
        return self._node

    async def start(self, machine: StateMachine, on_leadership: Callable[[Leadership], None]) -> None:
        """Begin, leading; `on_leadership` hears of it on the next turn of the loop."""
        self._machine = machine
        self._on_leadership = on_leadership
        self._lead(leading=True)

    def propose(self, command: bytes) -> asyncio.Future[object]:
        """Ask for `command` to be applied."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[object] = loop.create_future()
        if not self._leading:
            future.set_exception(NotProposed(f"{self._node} is not running"))
        elif len(command) > self._max_command_bytes:
            future.set_exception(NotProposed(f"{len(command)} bytes; the limit is {self._max_command_bytes}"))
        elif len(self._waiting) >= self._proposals_max:
            future.set_exception(NotProposed(f"{self._proposals_max} proposals wait already"))
        else:
            self._waiting.append((command, future))
            if not self._woken:
                self._woken = True
                loop.call_soon(self._work)
        return future

    def leadership(self) -> Leadership:
        """Who leads: this node, while it runs."""
        return Leadership(term=self._term, leader=self._node if self._leading else None, is_leader=self._leading)

    def reachable(self) -> frozenset[str]:
        """Nobody: there is no other node."""
        return frozenset()

    def understands(self) -> dict[str, int | None]:
        """What this node understands; there is no other."""
        return {self._node: self._understands}

    def joining(self) -> frozenset[str]:
        """Nobody."""
        return frozenset()

    @property
    def trouble(self) -> str | None:
        """None."""
        return None

    async def transfer(self) -> bool:
        """False: there is nobody to hand over to."""
        return False

    async def stop(self) -> None:
        """Stop. What still waits ends in `ProposalUnknown`."""
        self._lead(leading=False)
        waiting, self._waiting = self._waiting, []
        abandon(waiting, "the node was stopped")

    def _work(self) -> None:
        """Take what waits and commit it."""
        self._woken = False
        waiting, self._waiting = self._waiting, []
        self._apply(waiting)

    def _apply(self, batch: Waiting) -> None:
        """Apply committed commands in order, and tell who asked."""
        assert self._machine is not None
        for position, (command, future) in enumerate(batch):
            if not self._leading:
                abandon(batch[position:], "the node was stopped")
                return
            try:
                result = self._machine.apply(command)
            except Exception as error:  # noqa: BLE001 - whatever it is, this node must stop
                _log.critical("%s: apply failed; this node must stop", self._node, exc_info=True)
                abandon(batch[position:], "the node failed")
                self._fail(error)
                return
            if not future.done():
                future.set_result(result)

    def _fail(self, error: BaseException) -> None:
        """Never go on after `error`."""
        self._lead(leading=False)
        waiting, self._waiting = self._waiting, []
        abandon(waiting, "the node failed")
        if self._on_fatal is not None:
            asyncio.get_running_loop().call_soon(self._on_fatal, error)

    def _lead(self, *, leading: bool) -> None:
        if self._leading == leading:
            return
        self._leading = leading
        if self._on_leadership is not None:
            asyncio.get_running_loop().call_soon(self._on_leadership, self.leadership())


def abandon(batch: Waiting, why: str) -> None:
    """Tell those who still wait that nobody knows."""
    for _command, future in batch:
        if not future.done():
            future.set_exception(ProposalUnknown(why))
