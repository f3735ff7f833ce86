"""A replicated log whose leadership, and the fate of every proposal, is in the test's hands."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.replication.log import Leadership, NotProposed, ProposalUnknown, StateMachine
from coordinator.levels import NEWEST


@dataclass(slots=True, eq=False)
class Proposal:
    """One command that somebody proposed, and its future."""

    node: str
    command: bytes
    future: asyncio.Future[object]


class HandLog:
    """One node's end of a `Replicas`: the `ReplicatedLog` protocol."""

    def __init__(self, replicas: "Replicas", node: str) -> None:
        self._replicas = replicas
        self._node = node
        self.machine: StateMachine | None = None
        self.on_leadership: Callable[[Leadership], None] | None = None
        self.view = Leadership(term=0, leader=None, is_leader=False)
        self.applied = 0
        self.joiners: frozenset[str] = frozenset()
        self.trouble: str | None = None
        self.deaf = False
        """Applies nothing for now, as a node that is behind."""

    @property
    def node(self) -> str:
        return self._node

    async def start(self, machine: StateMachine, on_leadership: Callable[[Leadership], None]) -> None:
        self.machine, self.on_leadership = machine, on_leadership
        asyncio.get_running_loop().call_soon(lambda: on_leadership(self.view))

    def propose(self, command: bytes) -> asyncio.Future[object]:
        return self._replicas.propose(self, command)

    def leadership(self) -> Leadership:
        return self.view

    def reachable(self) -> frozenset[str]:
        return frozenset(log.node for log in self._replicas.logs.values() if log is not self and log.machine)

    def understands(self) -> dict[str, int | None]:
        return dict(self._replicas.understand)

    def joining(self) -> frozenset[str]:
        return self.joiners

    async def transfer(self) -> bool:
        return await self._replicas.transfer(self.node)

    async def stop(self) -> None:
        self.machine = None
        self.tell(Leadership(term=self.view.term, leader=None, is_leader=False))

    def tell(self, view: Leadership) -> None:
        """Let this node believe `view`."""
        self.view = view
        if self.on_leadership is not None:
            self.on_leadership(view)

    def catch_up(self) -> None:
        """Apply what is committed and not applied here yet."""
        while self.machine is not None and not self.deaf and self.applied < len(self._replicas.committed):
            command = self._replicas.committed[self.applied]
            self.applied += 1
            result = self.machine.apply(command.command)
            if command.node == self.node and not command.future.done():
                command.future.set_result(result)


@dataclass(slots=True, eq=False)
class Replicas:
    """Some nodes' logs. `hold`: proposals wait in `waiting` for the test to say what becomes of them."""

    nodes: tuple[str, ...] = ("n1",)
    hold: bool = False
    term: int = 0
    waiting: list[Proposal] = field(default_factory=list)
    committed: list[Proposal] = field(default_factory=list)
    proposed: int = 0
    successor: str | None = None
    """To whom a stopping leader hands over."""
    understand: dict[str, int | None] = field(default_factory=dict)
    """What each node says of itself: that it is of today, unless the test says otherwise."""
    logs: dict[str, HandLog] = field(init=False)

    def __post_init__(self) -> None:
        self.understand = dict.fromkeys(self.nodes, NEWEST) | self.understand
        self.logs = {node: HandLog(self, node) for node in self.nodes}

    def propose(self, log: HandLog, command: bytes) -> asyncio.Future[object]:
        future: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        if not log.view.is_leader or log.machine is None:
            future.set_exception(NotProposed(f"{log.node} does not lead"))
            return future
        self.proposed += 1
        self.waiting.append(Proposal(log.node, command, future))
        if not self.hold:
            asyncio.get_running_loop().call_soon(self.commit)
        return future

    def commit(self, count: int | None = None) -> None:
        """Commit the first `count` proposals that wait, or all: every node that is not deaf applies them."""
        taken = self.waiting[: len(self.waiting) if count is None else count]
        del self.waiting[: len(taken)]
        self.committed.extend(taken)
        for log in self.logs.values():
            log.catch_up()

    def refuse(self) -> None:
        """What waits was never in the log."""
        self._fail(NotProposed("said so by the test"))

    def lose(self) -> None:
        """What waits has an unknown fate, and was lost."""
        self._fail(ProposalUnknown("said so by the test"))

    def commit_unheard(self) -> None:
        """What waits is committed, but its proposers are told that nobody knows."""
        for proposal in self.waiting:
            if not proposal.future.done():
                proposal.future.set_exception(ProposalUnknown("said so by the test"))
        self.commit()

    def _fail(self, error: Exception) -> None:
        waiting, self.waiting = self.waiting, []
        for proposal in waiting:
            if not proposal.future.done():
                proposal.future.set_exception(error)

    def lead(self, node: str | None, *, term: int | None = None, unheard_by: tuple[str, ...] = ()) -> None:
        """`node` leads a new term, or nobody does. Nodes in `unheard_by` go on believing what they believed."""
        self.term = term if term is not None else self.term + (node is not None)
        for log in self.logs.values():
            if log.node not in unheard_by and log.machine is not None:
                log.tell(Leadership(term=self.term, leader=node, is_leader=log.node == node))

    async def transfer(self, node: str) -> bool:
        if self.successor is None or self.successor == node:
            return False
        self.lead(self.successor)
        return True
