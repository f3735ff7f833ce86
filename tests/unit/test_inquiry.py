"""After a restore: what was lost is found out from the participants, and nothing is said before it is."""

import asyncio
from dataclasses import replace

import pytest
from msgspec import structs

from cluster.replication.memory import MemoryLog
from coordinator import inquiry
from coordinator.facts import Participant
from coordinator.inquiry import Inquiry
from coordinator.ledger import Ledger
from coordinator.protocol.entries import Enlisted, Reconciled
from coordinator.protocol.messages import Abort, Commit, Gid, Prepare, Stamp
from coordinator.protocol.transaction import Branch, Transaction
from coordinator.reconcile import Found, Release, Wait, judge_active, judge_copied, judge_unknown
from coordinator.reconcile import Testimony as Said
from participants.manager import Envelope, Unavailable
from participants.null import NullManager
from participants.server import start
from participants.settings import ServerSettings
from tests.support.nodes import configs, running
from tests.support.participants import http
from tests.support.waiting import eventually
from tests.unit.test_what_participants_know import Silent

# ------------------------------------------------------------------------------------------------ the rules

NOBODY: frozenset[str] = frozenset()
PREPARED = Said(branches=(("b", "prepared"),))
COMMITTED = Said(branches=(("b", "committed"),))
ABORTED = Said(branches=(("b", "aborted"),))
READ_ONLY = Said(branches=(("b", "read_only"),))
NOTHING = Said()
ENDED = Said(ended=True)
MUTE = Said(can_tell=False)
SILENT = None


def of(*told):
    """By participants p0, p1, ..., each with a branch of its own."""
    found = {}
    for number, each in enumerate(told):
        own = each if each is None else replace(each, branches=tuple((f"b{number}", s) for _, s in each.branches))
        found[f"p{number}"] = own
    return found


def outcome(judgement):
    match judgement:
        case Reconciled(decision=None):
            return "forgotten"
        case Reconciled(decision=decision):
            return str(decision)
        case Release():
            return "release"
        case Wait(names=names):
            return "wait " + " ".join(names)


@pytest.mark.parametrize(
    ("told", "wanted"),
    [
        ((PREPARED, COMMITTED), "commit"),
        ((PREPARED, COMMITTED, SILENT), "commit"),
        ((PREPARED, ABORTED, SILENT), "abort"),
        ((PREPARED, PREPARED), "abort"),
        ((PREPARED, NOTHING), "abort"),
        ((PREPARED, READ_ONLY), "abort"),
        ((PREPARED, SILENT), "wait p1"),
        ((PREPARED, MUTE), "wait p1"),
        ((replace(PREPARED, can_tell=False), NOTHING), "abort"),
    ],
)
def test_of_what_nobody_here_knows(told, wanted):
    judgement = judge_unknown("m-5-1", of(*told), NOBODY)
    assert outcome(judgement) == wanted
    if wanted.startswith("wait"):
        assert outcome(judge_unknown("m-5-1", of(*told), {"p1"})) == "abort"
    if wanted == "commit":
        assert {plan.name for plan in judgement.branches} == {"b0", "b1"}
    if wanted == "abort":
        assert {plan.name for plan in judgement.branches} >= {"b0"}


@pytest.mark.parametrize(
    ("told", "wanted"),
    [
        ((PREPARED, COMMITTED), "commit"),
        ((NOTHING, COMMITTED), "commit"),
        ((SILENT, COMMITTED), "commit"),
        ((ENDED, COMMITTED), "commit"),
        ((SILENT, ABORTED), "abort"),
        ((PREPARED, PREPARED), "commit"),
        ((PREPARED, READ_ONLY), "commit"),
        ((PREPARED, NOTHING), "abort"),
        ((NOTHING, NOTHING), "abort"),
        ((ENDED, ENDED), "forgotten"),
        ((ENDED, READ_ONLY), "forgotten"),
        ((ENDED, NOTHING), "abort"),
        ((PREPARED, SILENT), "wait p1"),
        ((ENDED, SILENT), "wait p1"),
        ((PREPARED, MUTE), "release"),
        ((NOTHING, MUTE), "abort"),
    ],
)
def test_of_what_the_copy_holds_undecided(told, wanted):
    branches = tuple(Branch(name=f"b{n}", participant=f"p{n}", payload=b"1") for n in range(len(told)))
    txn = Transaction(gid="m-5-1", protocol="2pc", epoch=5, branches=branches, timeout_ms=1, started_at=0)
    judgement = judge_copied(txn, of(*told), NOBODY)
    assert outcome(judgement) == wanted
    if wanted == "commit":
        assert {vote.branch for vote in judgement.votes} == {"b0", "b1"}
    if wanted.startswith("wait"):
        assert outcome(judge_copied(txn, of(*told), {"p1"})) in ("abort", "forgotten")


@pytest.mark.parametrize(
    ("told", "wanted"),
    [
        ((NOTHING, COMMITTED), "forgotten"),
        ((SILENT, COMMITTED), "forgotten"),
        ((PREPARED, ABORTED), "abort"),
        ((NOTHING, NOTHING), "abort"),
        ((NOTHING, MUTE), "wait p1"),
        ((NOTHING, SILENT), "wait p1"),
        # Below the floor: over, and its records are dropped. It may have been committed.
        ((NOTHING, ENDED), "forgotten"),
        ((ENDED, ENDED), "forgotten"),
        ((ENDED, READ_ONLY), "forgotten"),
        ((ENDED, ABORTED), "abort"),
        ((ENDED, SILENT), "wait p1"),
    ],
)
def test_of_what_the_copy_holds_active(told, wanted):
    txn = Transaction(gid="m-5-1", protocol="2pc", epoch=5, branches=(), timeout_ms=1, started_at=0, active=True)
    assert outcome(judge_active(txn, of(*told), NOBODY)) == wanted


@pytest.mark.parametrize(
    ("told", "wanted"),
    [
        ((PREPARED, NOTHING), "abort"),
        ((NOTHING, ENDED), "abort"),  # whoever has voted keeps a record of it, or has a floor above it
        ((PREPARED, ENDED), "abort"),  # what is prepared has not ended
        ((ENDED, NOTHING), "forgotten"),
    ],
)
def test_of_a_branch_that_the_copy_holds_active(told, wanted):
    branches = (Branch(name="b0", participant="p0", payload=b"1"),)
    txn = Transaction(gid="m-5-1", protocol="2pc", epoch=5, branches=branches, timeout_ms=1, started_at=0, active=True)
    assert outcome(judge_active(txn, of(*told), NOBODY)) == wanted


def test_a_branch_that_came_after_the_copy_is_noted_before_the_abort():
    branches = (Branch(name="b0", participant="p0", payload=b"1"),)
    txn = Transaction(gid="m-5-1", protocol="2pc", epoch=5, branches=branches, timeout_ms=1, started_at=0, active=True)
    judgement = judge_active(txn, of(PREPARED, PREPARED), NOBODY)
    assert judgement == Found(branches=(Enlisted(gid="m-5-1", branch="b1", participant="p1"),))


# ------------------------------------------------------------------------------------------------ a node that asks


class World:
    """Participants a and b, as a lost cluster has left them, and the copy that there is of it."""

    def __init__(self, a, b):
        self.a, self.b = a, b
        self.copy = b""
        self.undecided: list[str] = []

    async def say(self, manager, message, epoch=7):
        await manager.handle([Envelope(message, Stamp(epoch=epoch))])

    async def prepare(self, manager, gid):
        await self.say(manager, Prepare(gid=gid, branch="a" if manager is self.a else "b", payload=b"1"))

    async def commit(self, manager, gid):
        await self.say(manager, Commit(gid=gid, branch="a" if manager is self.a else "b"))

    async def states(self, *gids):
        """What a and b have on record."""
        found = dict.fromkeys(gids, "")
        for manager in (self.a, self.b):
            known = await getattr(manager, "_manager", manager).known(list(gids))
            for gid in gids:
                states = [each.state for each in known.branches if each.gid == gid]
                found[gid] += states[0][0] if states else "-"
        return found


class Life:
    """A node of cluster `test`, alone, on a log in memory, and its participants' servers."""

    def __init__(self, world):
        self.world = world
        self.generation = 2 if world.copy else 1

    async def __aenter__(self):
        settings = ServerSettings(ask_backoff_s=0.01, ask_backoff_cap_s=0.05, in_doubt_after_s=0.01)
        self.servers = [await start(manager, settings=settings) for manager in (self.world.a, self.world.b)]
        self._context = running(replace(configs()[0], generation=self.generation), MemoryLog("n1", understands=2))
        self.node = await self._context.__aenter__()
        await eventually(lambda: self.node.node.ledger.level == 2)
        return self

    async def __aexit__(self, *error):
        await self._context.__aexit__(*error)
        for server in self.servers:
            await server.stop()

    async def register(self):
        for name, server in zip("ab", self.servers, strict=True):
            await self.node.register(name, server.url, batch=True)

    async def backup(self):
        reply = await self.node.call("GET", "/v1/backup")
        assert reply.status == 200
        self.world.copy = reply.raw

    async def restore(self):
        reply = await self.node.call("POST", "/v1/restore", raw=self.world.copy)
        assert reply.status == 200, reply.raw
        return reply.json

    async def status(self):
        while True:
            reply = await self.node.call("GET", "/v1/reconciliation")
            if reply.status == 200:
                return reply.json
            assert reply.status == 503

    async def closed(self):
        await eventually(lambda: self.node.node.ledger.lost is None and self.node.node.ledger.epoch_base)
        return await self.status()

    async def outcome(self, gid):
        reply = await self.node.call("GET", f"/v1/outcomes/{gid}")
        return reply.json["outcome"] if reply.status == 200 else reply.code


@pytest.fixture
def rounds_follow_at_once(monkeypatch):
    """For tests that a few rounds change nothing."""
    monkeypatch.setattr("coordinator.inquiry._PAUSE_S", 0.01)
    monkeypatch.setattr("coordinator.inquiry._PAUSE_MAX_S", 0.01)


async def rounds(life, count=5):
    """The inquiry asks so many times more, which is enough for it to end by far; or it has ended."""
    inquiry = life.node.node._inquiry
    begun = inquiry._rounds
    await eventually(lambda: inquiry._rounds > begun + count or life.node.node.ledger.lost is None)


@pytest.fixture
def records_stay(monkeypatch):
    """Participants drop what is below the floor; here it is looked at when all is over."""
    monkeypatch.setattr("participants.null.prunable", lambda *_: False)


@pytest.fixture
async def world():
    """Cluster `test` did 3 transactions, was copied, and went on by itself up to epoch 7."""
    world = World(NullManager(), NullManager())
    async with Life(world) as life:
        await life.register()
        world.told = [(await life.node.submit("a", "b", key=f"k{n}", wait="ended")).json for n in range(3)]
        await life.backup()
    return world


async def test_all_that_was_told_is_there_and_new_work_goes_on(world):
    async with Life(world) as life:
        answer = await life.restore()
        assert answer["restored"]["transactions"] == 3
        assert answer["epoch_base"] == answer["restored"]["epoch"] + 100_000
        await life.register()
        for number, txn in enumerate(world.told):
            assert (await life.node.show(txn["gid"]))["decision"] == "commit"
            assert (await life.node.submit("a", "b", key=f"k{number}")).json["gid"] == txn["gid"]
        new = await life.node.submit("a", "b", wait="ended")
        assert new.json["decision"] == "commit"
        assert int(new.json["gid"].split("-")[1]) > 100_000
        assert (await life.closed())["settled"] == {"committed": 0, "aborted": 0, "forgotten": 0}
        shown = (await life.node.call("GET", "/v1/cluster")).json
        assert (shown["ready"], shown["reconciling"]) == (True, False)
        again = await life.node.call("POST", "/v1/restore", raw=world.copy)
        assert (again.status, again.code) == (409, "not_empty")


@pytest.mark.usefixtures("records_stay")
async def test_what_was_lost_is_found_out(world):
    gids = ["test-5-1", "test-5-2", "test-6-1", "test-7-1"]
    both_committed, torn, both_prepared, one = gids
    for manager in (world.a, world.b):
        for gid in gids[:3]:
            await world.prepare(manager, gid)
    await world.prepare(world.b, one)
    for manager in (world.a, world.b):
        await world.commit(manager, both_committed)
    await world.commit(world.a, torn)
    async with Life(world) as life:
        await life.restore()
        assert await life.outcome(torn) == "not_known_yet"
        await life.register()
        settled = (await life.closed())["settled"]
        assert settled == {"committed": 1, "aborted": 2, "forgotten": 0}
        assert await world.states(*gids) == {both_committed: "cc", torn: "cc", both_prepared: "aa", one: "-a"}
        assert [await life.outcome(gid) for gid in gids] == ["forgotten", "committed", "aborted", "aborted"]
        assert (await life.node.show(torn))["reason"] == "a participant has committed it"


async def test_when_it_is_over_nothing_of_the_range_is_taken_any_more(world):
    async with Life(world) as life:
        base = (await life.restore())["epoch_base"]
        await life.register()
        await life.closed()
        for manager in (world.a, world.b):
            known = await getattr(manager, "_manager", manager).known(["test-5-9"])
            assert Gid.of_number("test", known.floor) == Gid("test", base + 1, 0)


@pytest.mark.usefixtures("records_stay")
@pytest.mark.parametrize("left_out", [False, True])
async def test_who_does_not_answer_is_waited_for(world, left_out):
    gid = "test-5-1"
    for manager in (world.a, world.b):
        await world.prepare(manager, gid)
    await world.commit(world.a, gid)
    async with Life(world) as life:
        await life.restore()
        await life.node.register("b", life.servers[1].url)  # and a is where it was, and nobody is there

        inquiry = life.node.node._inquiry
        await eventually(lambda: inquiry.status()["waiting_for"] == ["a"] and inquiry.status()["prepared"] == 1)
        assert await life.outcome(gid) == "not_known_yet"
        assert (await world.states(gid))[gid] == "cp"
        if left_out:
            unknown = await life.node.call("PUT", "/v1/reconciliation", {"without": "z"})
            assert (unknown.status, unknown.code) == (404, "not_found")
            reply = await life.node.call("PUT", "/v1/reconciliation", {"without": "a"})
            assert reply.json["without"] == ["a"]
            await life.closed()
            assert (await world.states(gid))[gid] == "ca", "which is what leaving it out may cost"
        else:
            await life.node.register("a", life.servers[0].url)
            await life.closed()
            assert (await world.states(gid))[gid] == "cc"


async def away(_batch):
    raise Unavailable("it is away")


async def undecided_copy(world, fates):
    """Transactions that the copy holds undecided; then the lost cluster did with them what `fates` say."""
    gids = []
    async with Life(world) as life:
        await life.register()
        kept = [world.a.handle, world.b.handle]
        for manager in (world.a, world.b):
            manager.handle = away
        for _ in fates:
            reply = await life.node.submit("a", "b", wait="none", timeout_s=0.3, key=f"key-{len(gids)}")
            gids.append(reply.json["gid"])
        await life.backup()
    for manager, handle in zip((world.a, world.b), kept, strict=True):
        manager.handle = handle
    for gid, fate in zip(gids, fates, strict=True):
        for manager, what in zip((world.a, world.b), fate, strict=True):
            if what in "pc":
                await world.prepare(manager, gid)
            if what == "c":
                await world.commit(manager, gid)
            if what == "a":
                await world.say(manager, Abort(gid=gid, branch="a" if manager is world.a else "b"))
    return gids


@pytest.mark.usefixtures("records_stay", "rounds_follow_at_once")
async def test_what_the_copy_holds_undecided_is_asked_about_first():
    world = World(NullManager(), NullManager())
    fates = ["cp", "pp", "cc", "pa", "p-", "--"]
    gids = await undecided_copy(world, fates)
    async with Life(world) as life:
        await life.restore()
        # Nobody is reachable yet, and the deadline has passed long ago: nothing is decided by it.
        await rounds(life)
        assert {(await life.node.show(gid))["decision"] for gid in gids} == {None}
        for what in ("abort", "acknowledge"):
            refused = await life.node.call("POST", f"/v1/transactions/{gids[0]}/{what}")
            assert (refused.status, refused.code) == (503, "not_known_yet")
        await life.register()
        await life.closed()
        shown = [(await life.node.show(gid))["decision"] for gid in gids]
        assert shown == ["commit", "commit", "commit", "abort", "abort", "abort"]
        await eventually(lambda: not life.node.node.ledger.unfinished)
        states = await world.states(*gids)
        assert [states[gid] for gid in gids] == ["cc", "cc", "cc", "aa", "aa", "aa"]
        assert (await life.node.submit("a", "b", timeout_s=0.3, key="key-1")).json["gid"] == gids[1]


async def test_what_has_ended_and_nobody_knows_how_is_forgotten():
    world = World(NullManager(), NullManager())
    (gid,) = await undecided_copy(world, ["cc"])
    for manager in (world.a, world.b):
        await manager.handle([Envelope(Abort(gid="test-7-9", branch="x"), Stamp(epoch=7, floor="test-7-8"))])
    async with Life(world) as life:
        await life.restore()
        await life.register()
        assert (await life.closed())["settled"]["forgotten"] == 1
        reply = await life.node.call("GET", f"/v1/transactions/{gid}")
        assert (reply.status, reply.code) == (410, "forgotten")


@pytest.mark.usefixtures("records_stay")
async def test_who_cannot_tell_is_asked_to_prepare_again():
    world = World(NullManager(), NullManager())
    committed, torn = await undecided_copy(world, ["cc", "pc"])
    world.b = Silent(world.b)
    async with Life(world) as life:
        await life.restore()
        await life.register()
        await life.closed()
        states = await world.states(committed, torn)
        assert states == {committed: "cc", torn: "cc"}


async def test_what_is_forgotten_is_owed_to_nobody_any_more():
    world = World(NullManager(), NullManager())
    (gid,) = await undecided_copy(world, ["p-"])
    world.b = Silent(world.b)
    world.b.handle = away
    async with Life(world) as life:
        await life.restore()
        await life.register()
        driver = life.node.node.driver
        await eventually(lambda: driver._courier.owed("b"))  # it cannot tell, so it is asked to prepare again
        await driver.log(Reconciled(gid=gid, reason="it ended in what was lost"), 100)
        assert life.node.node.ledger.get(gid) is None
        assert [driver._courier.owed(name) for name in "ab"] == [0, 0]
        assert gid not in driver._released


async def test_participants_are_told_no_floor_meanwhile(world, scripted):
    gid = "test-5-1"
    for manager in (world.a, world.b):
        await world.prepare(manager, gid)
    await world.commit(world.a, gid)
    floor = (await world.a.known([gid])).floor
    async with Life(world) as life:
        await life.restore()
        await life.node.register("a", life.servers[0].url, batch=True)  # b is not there
        await life.node.register("silent", scripted.url)
        for _ in range(5):
            assert (await life.node.submit("a", wait="ended")).json["decision"] == "commit"
        assert (await world.a.known([gid])).floor == floor
        assert (await world.states(gid))[gid] == "cp"


@pytest.mark.usefixtures("records_stay", "rounds_follow_at_once")
async def test_what_is_at_work_is_waited_for(world):
    """A prepare of the lost cluster that takes long: it would be prepared after all was said to be over."""
    gid, gate = "test-6-5", asyncio.Event()
    handle = world.a.handle

    async def slow(batch):
        if any(isinstance(each.message, Prepare) and each.message.gid == gid for each in batch):
            await gate.wait()
        return await handle(batch)

    world.a.handle = slow
    async with Life(world) as life:
        body = {"gid": gid, "branch": "a", "epoch": 7, "payload": 1, "deadline_ms": None}
        sending = asyncio.ensure_future(life.node.session.post(f"{life.servers[0].url}/prepare", json=body))
        await eventually(lambda: life.servers[0]._intake.working)
        await life.restore()
        await life.register()
        inquiry = life.node.node._inquiry
        await eventually(lambda: inquiry._views and all(view.answered for view in inquiry._views.values()))
        await rounds(life)
        waited = (await life.status())["open"]
        gate.set()
        (await sending).close()
        assert waited, "something is at work"
        await life.closed()
        assert await life.outcome(gid) == "aborted"
        assert (await world.states(gid))[gid] == "a-"


async def test_a_higher_epoch_than_ours_is_an_alarm(world, caplog):
    await world.prepare(world.a, "test-5-1")
    await world.say(world.a, Abort(gid="test-5-9", branch="a"), epoch=900_000)
    async with Life(world) as life:
        await life.restore()
        await life.register()
        await eventually(lambda: "restore again with --above-epoch 900000" in caplog.text)


_PREPARED = b'{"gid":"test-5-1","branch":"b","state":"prepared","prepared_at":0}'


@pytest.mark.parametrize(
    "body",
    [
        b"[]",
        b"{}",
        b'{"branches":[1]}',
        b"x",
        b'{"branches":[{"gid":1,"branch":"b","state":"s"}]}',
        b'{"known":true,"branches":[%b,%b]}' % (_PREPARED, _PREPARED),
    ],
)
async def test_nonsense_is_no_answer(world, scripted, body):
    scripted.rule = lambda _: http(200, body)
    async with Life(world) as life:
        await life.restore()
        await life.node.register("a", life.servers[0].url)
        await life.node.register("b", scripted.url)
        await eventually(lambda: life.node.node._inquiry.status()["waiting_for"] == ["b"])
        assert (await life.status())["participants"]["b"]["trouble"]


# ------------------------------------------------------------------------------------------------ copies


async def test_a_url_that_is_none_is_no_answer(world):
    async with Life(world) as life:
        await life.restore()
        participants, views = life.node.node.ledger.participants, life.node.node._inquiry.status
        participants["a"] = structs.replace(participants["a"], url="http://[::1")
        await eventually(lambda: "Invalid IPv6" in str(views()["participants"].get("a")))
        await life.register()
        await life.closed()


async def test_a_defect_ends_a_round_and_not_the_inquiry(world, monkeypatch, caplog):
    monkeypatch.setattr(inquiry, "_PAUSE_MAX_S", 0.0)
    async with Life(world) as life:
        asking = life.node.node._inquiry
        monkeypatch.setattr(asking, "_round", broken)
        await life.restore()
        await life.register()
        await eventually(lambda: "a defect of this node" in caplog.text)
        assert life.node.node.ledger.lost is not None
        monkeypatch.undo()
        await life.closed()


async def broken(_lost):
    raise RuntimeError("a defect")


async def test_what_is_told_and_answered_with_nonsense_is_named(world, scripted):
    scripted.rule = lambda _heard: http(200, b"[]")
    async with Life(world) as life:
        asking = life.node.node._inquiry
        with pytest.raises(inquiry._NoAnswer, match="POST /abort was answered"):
            await asking._call(Participant(name="a", url=scripted.url, batch=False), "/abort", {})
        with pytest.raises(inquiry._NoAnswer, match="GET /branches was answered"):
            await asking._get(Participant(name="a", url=scripted.url, batch=False), "/branches?before=test-1-1")


async def test_copies_that_are_refused_leave_nothing(world):
    whole = world.copy
    async with Life(world) as life:
        for raw, status, code in (
            (whole[:-5], 422, "broken_copy"),
            (whole[:40] + b"x" + whole[41:], 422, "broken_copy"),
            (b"", 422, "broken_copy"),
            (b"PK" * 100, 422, "broken_copy"),
        ):
            reply = await life.node.call("POST", "/v1/restore", raw=raw)
            assert (reply.status, reply.code) == (status, code), reply.raw
        assert life.node.node.ledger.is_fresh
        await life.restore()
        await life.register()
        await life.closed()


async def test_a_cluster_made_anew_says_nothing_before_it_has_its_copy(world):
    """In an epoch of its own it would presume of every older gid that it is aborted."""
    gid = "test-0-7"
    async with Life(world) as life:
        await life.register()
        assert await life.outcome(gid) == "awaiting_copy"
        assert (await life.node.submit("a")).code == "awaiting_copy"
        assert (await life.node.call("GET", f"/v1/transactions/{gid}")).code == "awaiting_copy"
        for method, path in (
            ("POST", f"/v1/transactions/{gid}/abort"),
            ("POST", f"/v1/transactions/{gid}/acknowledge"),
            ("GET", "/v1/transactions"),
            ("GET", "/v1/backup"),
        ):
            assert (await life.node.call(method, path)).code == "awaiting_copy", path
        assert (await life.node.call("GET", "/v1/cluster")).json["reconciling"]
        assert (await life.status())["awaits_copy"]
        await life.restore()
        assert not (await life.status())["awaits_copy"]
        await life.closed()


async def test_whose_answer_is_waited_for_stays_registered(world):
    """Unregistered, it would not be asked any more, and what only it has committed would be taken for aborted."""
    async with Life(world) as life:
        await life.register()
        await life.servers[1].stop()
        await life.restore()
        reply = await life.node.call("DELETE", "/v1/participants/b")
        assert (reply.status, reply.code) == (409, "being_found_out")
        assert life.node.node.ledger.lost is not None
        assert (await life.node.call("PUT", "/v1/reconciliation", {"without": "b"})).status == 200
        assert (await life.node.call("DELETE", "/v1/participants/b")).status == 204
        await life.closed()


async def test_the_same_generation_is_refused(world):
    life = Life(world)
    life.generation = 1
    async with life:
        assert await life.outcome("test-0-7") == "aborted", "which is why"
        reply = await life.node.call("POST", "/v1/restore", raw=world.copy)
        assert (reply.status, reply.code) == (409, "same_generation")
        assert life.node.node.ledger.is_fresh


async def test_a_copy_of_another_cluster(world):
    async with running(replace(configs()[0], cluster="other", generation=2), MemoryLog("n1", understands=2)) as node:
        await eventually(lambda: node.node.ledger.level == 2)
        reply = await node.call("POST", "/v1/restore", raw=world.copy)
        assert (reply.status, reply.code) == (422, "other_cluster")
        assert node.node.ledger.staged is None


@pytest.mark.usefixtures("records_stay")
async def test_those_that_wait_for_one_who_is_away_do_not_keep_the_rest_from_being_looked_at(monkeypatch):
    monkeypatch.setattr("coordinator.inquiry._PER_ROUND", 1)
    world = World(NullManager(), NullManager())
    gids = await undecided_copy(world, ["pp", "pp", "pc"])
    async with Life(world) as life:
        await life.restore()
        await life.node.register("b", life.servers[1].url)  # and a is away
        await eventually(lambda: str(life.node.node.ledger.get(gids[2]).decision) == "commit")
        inquiry = life.node.node._inquiry
        await eventually(lambda: inquiry.status()["undecided"] == 2)
        assert inquiry.status()["waiting_for"] == ["a"]
        await life.node.register("a", life.servers[0].url)
        await life.closed()
        assert await world.states(*gids) == dict.fromkeys(gids, "cc")


# ------------------------------------------------------------------------------------------------ known-bad variants


async def test_presuming_abort_in_the_range_would_be_noticed(world, monkeypatch):
    """A ledger without the range: b asks, is told "aborted", and a has committed."""
    install = Ledger._install

    def without_range(self, header, entry):
        applied = install(self, header, entry)
        self.lost = None
        return applied

    monkeypatch.setattr(Ledger, "_install", without_range)
    with pytest.raises((AssertionError, TimeoutError)):
        await test_what_was_lost_is_found_out(world)


async def test_no_base_would_be_noticed(world, monkeypatch):
    """Epochs that begin anew: gids are given out twice, and participants refuse old epochs."""
    install = Ledger._install

    def without_base(self, header, entry):
        applied = install(self, header, entry)
        self.epoch, self.epoch_base = header.epoch, 0
        return applied

    monkeypatch.setattr(Ledger, "_install", without_base)
    monkeypatch.setattr("coordinator.driver.Driver.awaits_copy", False)
    monkeypatch.setattr("tests.unit.test_inquiry.Life.closed", Life.status)
    with pytest.raises((AssertionError, TimeoutError)):
        async with asyncio.timeout(5):
            await test_all_that_was_told_is_there_and_new_work_goes_on(world)


@pytest.mark.usefixtures("records_stay", "rounds_follow_at_once")
async def test_ending_while_something_is_at_work_would_be_noticed(world, monkeypatch):
    """The fence alone would do here, too: the participant does not hear it before its work is done."""
    look = Inquiry._look

    async def blind(self, participant, lost):
        view = await look(self, participant, lost)
        view.exhaustive = view.answered
        return view

    async def unheard(*_):
        return True

    monkeypatch.setattr(Inquiry, "_look", blind)
    monkeypatch.setattr(Inquiry, "_fence", unheard)
    with pytest.raises(AssertionError, match="at work"):
        await test_what_is_at_work_is_waited_for(world)


@pytest.mark.usefixtures("rounds_follow_at_once")
async def test_deciding_by_the_deadline_would_be_noticed(monkeypatch):
    monkeypatch.setattr("coordinator.driver.Driver._is_restored", lambda _self, _gid: False)
    with pytest.raises(AssertionError):
        await test_what_the_copy_holds_undecided_is_asked_about_first()


async def test_telling_the_floor_would_be_noticed(world, scripted, monkeypatch):
    """Records of what was committed would be dropped before anybody has asked for them."""
    from coordinator.driver import Driver

    stamp = Driver._stamp

    def telling(self, participant):
        lost, self._ledger.lost = self._ledger.lost, None
        try:
            return stamp(self, participant)
        finally:
            self._ledger.lost = lost

    monkeypatch.setattr(Driver, "_stamp", telling)
    with pytest.raises(AssertionError):
        await test_participants_are_told_no_floor_meanwhile(world, scripted)


async def test_deciding_before_all_have_answered_would_be_noticed(world, monkeypatch):
    testimonies = Inquiry._testimonies

    async def hasty(self, asked, held, unknown):
        told = await testimonies(self, asked, held, unknown)
        return {(name, gid): told.get((name, gid), Said()) for name in asked for gid in unknown}

    monkeypatch.setattr(Inquiry, "_testimonies", hasty)
    with pytest.raises((AssertionError, TimeoutError)):
        async with asyncio.timeout(5):
            await test_who_does_not_answer_is_waited_for(world, left_out=False)
