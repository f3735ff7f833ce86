"""A participant that holds nothing: it votes prepared, acks, and keeps its records in memory only.

For benchmarks of the coordinator, and for tests of whoever talks to participants. It keeps every rule of the protocol
except the one about durability: a restart forgets all votes, so nothing that matters may depend on it.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from coordinator.protocol.messages import Answer, Gid, Prepared
from participants.manager import BranchId, Envelope, InDoubt, Known, KnownBranch
from participants.resource import Branch, Horizon, State, Work, finish, observe, prunable, receive

_PRUNED_PER_BATCH: Final = 64
"""Records looked at for pruning, beyond one per message, so that no single batch pays for a long backlog."""

_UNHEARD: Final = Branch()


class NullManager:
    """Votes prepared on everything. `now` tells the time in seconds since the Unix epoch."""

    batches_at_once: int = 1
    batch_limit: int = 1024

    def __init__(self, *, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._branches: dict[BranchId, Branch] = {}
        self._prepared_at: dict[BranchId, float] = {}
        self._horizons: dict[str, Horizon] = {}
        self._kept: deque[BranchId] = deque()

    async def open(self) -> Sequence[InDoubt]:
        """Nothing survives a restart."""
        return ()

    async def handle(self, batch: Sequence[Envelope]) -> Sequence[Answer]:
        """The answers, at once."""
        answers = [self._answer(envelope) for envelope in batch]
        self._prune(len(batch) + _PRUNED_PER_BATCH)
        return answers

    def _answer(self, envelope: Envelope) -> Answer:
        message, stamp = envelope
        key = envelope.id
        cluster = message.gid.rsplit("-", 2)[0]
        horizon = self._horizons[cluster] = observe(self._horizons.get(cluster, Horizon()), message.gid, stamp)
        before = self._branches.get(key, _UNHEARD)
        step = receive(before, horizon, message, stamp)
        if step.work is Work.RUN:
            step = finish(step.branch, Prepared(gid=message.gid, branch=message.branch))
            self._prepared_at[key] = self._now()
        if step.branch is not before:
            if step.branch.state is not State.PREPARED:
                self._prepared_at.pop(key, None)
            if before is _UNHEARD and step.branch != _UNHEARD:
                self._kept.append(key)
            if step.branch != _UNHEARD:
                self._branches[key] = step.branch
        assert step.answer is not None, "nothing is ever at work between two messages"
        return step.answer

    def _prune(self, at_most: int) -> None:
        for _ in range(min(at_most, len(self._kept))):
            key = self._kept.popleft()
            parsed = Gid.parse(key.gid)
            assert parsed is not None
            if prunable(self._branches[key], key.gid, self._horizons[parsed.cluster]):
                del self._branches[key]
            else:
                self._kept.append(key)

    async def in_doubt(self) -> Sequence[InDoubt]:
        """The prepared branches, oldest first."""
        return [InDoubt(gid=key.gid, branch=key.branch, prepared_at=at) for key, at in self._prepared_at.items()]

    async def known(self, gids: Sequence[str]) -> Known:
        """What is remembered of these transactions, since the last start."""
        cluster = gids[0].rsplit("-", 2)[0] if gids else ""
        horizon, wanted = self._horizons.get(cluster, Horizon()), set(gids)
        found = [
            KnownBranch(gid=key.gid, branch=key.branch, state=branch.state.value)
            for key, branch in self._branches.items()
            if key.gid in wanted
        ]
        return Known(branches=tuple(found), epoch=horizon.epoch, floor=horizon.floor)

    async def close(self) -> None:
        """Nothing to release."""
