"""kill -9 of whoever leads, or of a database server, at the worst moment of a two-phase commit.

The taps hold every commit and every abort. So transactions pile up whose branches are all prepared, whose decision is
in the log, and of whose decision no participant has heard. Then the leader dies, and what was held dies with it: the
participants have given up their right to abort, and the one who was to tell them is gone.
"""

import asyncio
import time
from dataclasses import dataclass
from typing import Final

from cluster.demo.databases import Server
from cluster.demo.stage import SERVICES, Stage
from cluster.local import Leader
from cluster.tap import Hold, is_decision

WANTED: Final = 3
"""Transactions that shall be prepared everywhere, at least one of them with a decision that is on its way."""

_CATCH_S: Final = 10.0
_FINISH_S: Final = 60.0
_LOOK_S: Final = 0.002


class NotCaught(Exception):
    """The worst moment did not come: nothing was prepared and undelivered in time."""


@dataclass(slots=True, kw_only=True)
class Crash:
    """One kill and what came after it. Times are seconds; `killed_s` is on the monotonic clock, the others since then.

    blocked: gids of the transactions whose branches were all prepared, and of whose outcome no participant had heard.
    decided: those among them whose commit had left the leader, so that it must be in the log.
    leader_after_s: until a survivor, or the one restarted, said that it leads. None: not seen (yet).
    finished_after_s: until the last branch of those blocked was finished. None: not seen (yet).
    """

    node: str
    blocked: tuple[str, ...]
    decided: tuple[str, ...]
    killed_s: float
    leader: Leader | None = None
    leader_after_s: float | None = None
    finished_after_s: float | None = None


@dataclass(slots=True, kw_only=True)
class Outage:
    """One kill of a database server, which was started again at once. Names and times as in `Crash`.

    back_after_s: until it took connections again. None: not yet.
    """

    server: str
    blocked: tuple[str, ...]
    decided: tuple[str, ...]
    killed_s: float
    back_after_s: float | None = None
    finished_after_s: float | None = None


async def strike(stage: Stage, leader: Leader) -> Crash:
    """Wait for the worst moment, and kill the leader in it. Raises `NotCaught`; nothing is killed then."""
    holds, blocked, decided = await _worst_moment(stage)
    killed_s = time.monotonic()
    try:
        await stage.cluster.kill(leader.node)
    finally:
        for hold in holds.values():
            hold.drop()
    return Crash(node=leader.node, blocked=blocked, decided=decided, killed_s=killed_s)


async def strike_server(stage: Stage, server: Server) -> Outage:
    """Wait for the worst moment, and kill the server in it. Raises `NotCaught`; nothing is killed then."""
    holds, blocked, decided = await _worst_moment(stage)
    killed_s = time.monotonic()
    try:
        await server.kill()
    finally:
        # The coordinator is alive, and goes on until it has delivered what it decided.
        for hold in holds.values():
            hold.release()
    return Outage(server=server.name, blocked=blocked, decided=decided, killed_s=killed_s)


async def _worst_moment(stage: Stage) -> tuple[dict[str, Hold], tuple[str, ...], tuple[str, ...]]:
    """Decisions are held, and enough transactions wait for theirs: the holds, these, and those that are decided."""
    holds = {name: tap.hold(is_decision) for name, tap in stage.taps.items()}
    try:
        return holds, *await _catch(stage, holds)
    except BaseException:
        for hold in holds.values():
            hold.release()
        raise


async def _catch(stage: Stage, holds: dict[str, Hold]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    deadline_s = time.monotonic() + _CATCH_S
    while True:
        blocked = set.intersection(*({gid for gid, _ in tap.prepared_now()} for tap in stage.taps.values()))
        commits = {message.gid for hold in holds.values() for message in hold.held if message.call == "commit"}
        decided = blocked & commits
        if decided and len(blocked) >= WANTED:
            return tuple(sorted(blocked)), tuple(sorted(decided))
        if time.monotonic() > deadline_s:
            raise NotCaught(f"{len(blocked)} of {WANTED} transactions were prepared and undelivered in {_CATCH_S:g} s")
        await asyncio.sleep(_LOOK_S)


async def recovery(stage: Stage, crash: Crash, *, newer_than: int) -> None:
    """Measure until somebody leads. Raises `ProcessTrouble` when nobody does."""
    besides = crash.node if len(stage.cluster.nodes) > 1 else None
    crash.leader = await stage.cluster.wait_for_leader(besides=besides, newer_than=newer_than)
    crash.leader_after_s = time.monotonic() - crash.killed_s


async def finished(stage: Stage, crash: Crash | Outage) -> None:
    """Measure until every branch of the blocked transactions is finished; not seen within a minute: it stays None."""
    keys = [(gid, name) for gid in crash.blocked for name in SERVICES]
    deadline_s = time.monotonic() + _FINISH_S
    while time.monotonic() < deadline_s:
        ends = [stage.taps[name].branches[gid, name].finished_s for gid, name in keys]
        if None not in ends:
            crash.finished_after_s = max(end for end in ends if end is not None) - crash.killed_s
            return
        await asyncio.sleep(_LOOK_S * 5)
