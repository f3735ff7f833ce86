"""Who looks on while a run lasts, and who looks at everything when it is over."""

import asyncio
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from cluster.calls import Caller, Unreachable
from cluster.chaos.history import Recorder
from cluster.chaos.load import Told, asked, order_of, seen
from cluster.chaos.stage import APPLICATION, LEDGER, Stage
from participants.shop.audit import audit, locks, marks

LOOK_S: Final = 0.25
"""Between looks at who leads, and at what is prepared."""

_ASK_S: Final = 2.0
_AT_ONCE: Final = 24
_FINAL_S: Final = 300.0
_PAGES: Final = 1_000
_PROBES: Final = 24
_PROBE_TRIES: Final = 20
_PROBE_S: Final = 10.0


class Watch:
    """Looks at `stage`, and notes what it sees. `caller` reaches the nodes."""

    def __init__(self, stage: Stage, caller: Caller, recorder: Recorder) -> None:
        self._stage, self._caller, self._recorder = stage, caller, recorder

    async def leader(self) -> None:
        """Who leads, and whoever says so of itself, until this is cancelled."""
        before: tuple[str | None, int | None] | None = None
        noted: set[tuple[str, int]] = set()
        while True:
            said = await self._leaders()
            for node, epoch in said:
                if (node, epoch) not in noted:
                    noted.add((node, epoch))
                    self._recorder.note("leads", node=node, epoch=epoch)
            now = max(said, key=lambda each: each[1], default=(None, None))
            if now != before:
                before = now
                self._recorder.note("leader", node=now[0], epoch=now[1])
            await asyncio.sleep(LOOK_S)

    async def _leaders(self) -> list[tuple[str, int]]:
        """Every running node that says it leads, with its epoch: each is asked directly, whatever is cut."""
        cluster = self._stage.cluster
        asked = [node for node in cluster.running if not cluster.process(node).paused]
        answers = await asyncio.gather(*(cluster.status(node) for node in asked))
        return [
            (node, answer["epoch"])
            for node, answer in zip(asked, answers, strict=True)
            # Before it is ready it shows the epoch of the leader before it.
            if answer is not None and answer["role"] == "leader" and answer["ready"]
        ]

    async def prepared(self, name: str) -> None:
        """What a service holds prepared, until this is cancelled."""
        while True:
            await self._prepared(name)
            await asyncio.sleep(LOOK_S)

    async def _prepared(self, name: str) -> list[str] | None:
        gids: list[str] | None = None
        try:
            answer = await self._caller.once("GET", f"{self._stage.services[name].url}/branches", within_s=_ASK_S)
        except Unreachable:
            pass  # it is killed or paused, and nothing can be said of it
        else:
            if answer.status == 200:
                gids = sorted({row["gid"] for row in answer.body["branches"]})
        self._recorder.note("prepared", participant=name, gids=gids)
        return gids

    async def until_none_is_prepared(self, *, within_s: float) -> bool:
        """Look until nothing is prepared anywhere; whether it came so far in time."""
        until_s = self._recorder.now_s + within_s
        while True:
            found = await asyncio.gather(*(self._prepared(name) for name in self._stage.services))
            if all(gids == [] for gids in found):
                return True
            if self._recorder.now_s > until_s:
                return False
            await asyncio.sleep(LOOK_S)

    # -------------------------------------------------------------------------------------------- at rest

    async def probe(self, used: Iterable[tuple[str, str]], node_url: str) -> None:
        """Order once more what was ordered, of whom it was ordered by: nothing may be locked.

        Like any client, a probe keeps its key until it has a definite answer. Only one that was refused takes another.
        """
        url = f"{node_url}/v1/transactions"
        for number, (sku, account) in enumerate(_share(used)):
            attempt = 0
            told = Told("unanswered", None, None)
            for tries in range(_PROBE_TRIES):
                key, op = f"probe-{number}-{attempt}", -(number * 100 + tries + 1)
                body = {**order_of(key, sku, account, 1), "wait": "ended"}
                self._recorder.note("asked", op=op, client=-1, key=key, body="order", node="any")
                told = await asked(self._caller, self._recorder, op, url, key, body, within_s=_PROBE_S)
                if told.outcome == "committed":
                    break
                if told.outcome not in ("undecided", "unknown"):
                    attempt += 1
                await asyncio.sleep(LOOK_S)
            self._recorder.note("probe", what=f"{sku} by {account}", outcome=told.outcome, detail=told.detail)

    async def final(self, gids: Iterable[str]) -> None:
        """Ask every node what became of every transaction, those that nobody was told of included."""
        known = dict.fromkeys(gids)
        known.update(dict.fromkeys(await self._listed()))
        nodes = dict(zip(self._stage.cluster.nodes, self._stage.cluster.urls, strict=True))
        limit = asyncio.Semaphore(_AT_ONCE)
        until_s = self._recorder.now_s + _FINAL_S

        async def ask(node: str, gid: str) -> None:
            async with limit:
                while self._recorder.now_s < until_s:
                    try:
                        answer = await self._caller.once(
                            "GET", f"{nodes[node]}/v1/transactions/{gid}", within_s=5 * _ASK_S
                        )
                    except Unreachable:
                        continue  # it has its reasons to be slow; what is never answered is missed by the checks
                    if answer.status in (200, 202, 404, 410):
                        self._recorder.note("final", node=node, gid=gid, outcome=seen(answer))
                        return
                    await asyncio.sleep(LOOK_S)

        await asyncio.gather(*(ask(node, gid) for gid in known for node in nodes))

    async def _listed(self) -> list[str]:
        """Every transaction that the leader lists."""
        found: list[str] = []
        after = ""
        for _ in range(_PAGES):
            try:
                answer = await self._caller.anywhere("GET", f"/v1/transactions?limit=1000{after}", within_s=20.0)
            except Unreachable:
                break
            if answer.status != 200:
                break
            found += [row["gid"] for row in answer.body["transactions"]]
            if answer.body["next"] is None:
                break
            after = f"&after={answer.body['next']}"
        return found

    async def databases(self, shop: Path) -> None:
        """Read what the databases hold."""
        report = await asyncio.to_thread(audit, shop)
        for participant, found in (await asyncio.to_thread(marks, shop)).items():
            self._recorder.note("marks", participant=participant, orders=found)
        for participant, count in (await asyncio.to_thread(locks, shop)).items():
            self._recorder.note("locks", participant=participant, count=count)
        goods = (report.stock_initial, report.stock_available, report.sold)
        money = (report.balance_initial_cents, report.balance_cents, report.charged_cents)
        for participant, (initial, left, moved) in (("inventory", goods), ("payments", money)):
            self._recorder.note("sums", participant=participant, initial=initial, left=left, moved=moved)
        self._recorder.note("audit", discrepancies=list(report.discrepancies))
        await self._application()

    async def _application(self) -> None:
        """The tables of the application, in both databases."""
        if not self._stage.dsns:
            return
        from cluster.chaos import books  # it needs asyncpg

        names = self._stage.books[APPLICATION]
        found = dict(zip(names, [await books.read(dsn) for dsn in self._stage.dsns], strict=True))
        for name, each in found.items():
            self._recorder.note("marks", participant=name, orders=each.entries, of=APPLICATION)
            self._recorder.note(
                "probe",
                what=f"any of the application's books at {name}",
                outcome="committed" if each.locked is None else "locked",
                detail=each.locked,
            )
        self._recorder.note("locks", participant=LEDGER, count=found[LEDGER].prepared)
        initial = sum(each.initial_cents for each in found.values())
        left = sum(each.left_cents for each in found.values())
        self._recorder.note("sums", participant=APPLICATION, initial=initial, left=left, moved=0)
        self._recorder.note("audit", discrepancies=[f"{name}: {text}" for name in names for text in found[name].wrong])


def _share(used: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """So many of them that each article and each account is among them, if it can be."""
    left = sorted(set(used))
    chosen: list[tuple[str, str]] = []
    for place in (0, 1):
        known = {each[place] for each in chosen}
        for each in left:
            if each[place] not in known and len(chosen) < (place + 1) * _PROBES:
                known.add(each[place])
                chosen.append(each)
    return chosen
