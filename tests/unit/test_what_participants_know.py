"""What a participant says of branches that are over: the same, whatever manages them."""

import aiohttp
import pytest

from coordinator.protocol.messages import Abort, Commit, Prepare, Stamp
from coordinator.protocol.record import replace
from participants.manager import BranchId, Envelope
from participants.null import NullManager
from participants.operations import Operations
from participants.per_branch import Held, PerBranchManager
from participants.server import start
from participants.sqlite import SqliteBranch, SqliteManager

STAMP = Stamp(epoch=7)


class Holding(PerBranchManager):
    async def prepare(self, branch: BranchId, payload: object) -> Held:
        return Held()

    async def commit(self, branch: BranchId) -> None: ...

    async def abort(self, branch: BranchId) -> None: ...


def sqlite(folder):
    operations = Operations()

    @operations.operation("put")
    def put(branch: SqliteBranch, key: str) -> None:
        branch.execute("INSERT INTO item VALUES (?)", (key,))

    schema = "CREATE TABLE IF NOT EXISTS item(k TEXT PRIMARY KEY NOT NULL)"
    return SqliteManager(folder / "x.db", operations, schema=schema)


MANAGERS = {
    "sqlite": sqlite,
    "per_branch": lambda folder: Holding(folder / "records.db"),
    "null": lambda _folder: NullManager(),
}


class Silent:
    """A manager that says only what is in doubt, as one that knows nothing of the question."""

    def __init__(self, manager):
        self._manager = manager
        for name in ("open", "handle", "in_doubt", "close", "batches_at_once", "batch_limit"):
            setattr(self, name, getattr(manager, name))


async def ask(url, query):
    async with aiohttp.ClientSession() as session, session.get(f"{url}/branches?{query}") as response:
        return response.status, await response.json(content_type=None)


def prepare(number):
    return Prepare(gid=f"m-1-{number}", branch="b", payload=b'{"op":"put","key":"%d"}' % number)


async def filled(manager):
    """1 is prepared, 2 committed, 3 aborted, and of 4 nobody has heard."""
    participant = await start(manager)
    for message in (
        prepare(1),
        prepare(2),
        Commit(gid="m-1-2", branch="b"),
        Abort(gid="m-1-3", branch="b"),
    ):
        await manager.handle([Envelope(message, STAMP)])
    return participant


@pytest.mark.parametrize("kind", MANAGERS)
async def test_every_manager_of_ours_tells(kind, tmp_path):
    manager = MANAGERS[kind](tmp_path)
    participant = await filled(manager)
    try:
        query = "&".join(f"gid=m-1-{number}" for number in (1, 2, 3, 4))
        status, body = await ask(participant.url, query)
        assert status == 200
        assert {(each["gid"], each["state"]) for each in body["branches"]} == {
            ("m-1-1", "prepared"),
            ("m-1-2", "committed"),
            ("m-1-3", "aborted"),
        }
        assert (body["known"], body["epoch"], body["floor"]) == (True, 7, None)
        # Below the floor records are dropped, and the answer says that they may have been.
        floor = replace(STAMP, floor="m-1-3")
        await manager.handle([Envelope(Abort(gid="m-1-9", branch="b"), floor)])
        _, body = await ask(participant.url, query)
        assert {each["gid"] for each in body["branches"]} >= {"m-1-1", "m-1-3"}
        assert body["floor"] == "m-1-3"
        _, body = await ask(participant.url, "before=m-1-1")
        assert body == {"branches": [], "total": 0, "working": 0}
        _, body = await ask(participant.url, "before=m-1-2")
        assert [each["gid"] for each in body["branches"]] == ["m-1-1"]
    finally:
        await participant.stop()


async def test_who_cannot_tell_says_so():
    participant = await filled(Silent(NullManager()))
    try:
        status, body = await ask(participant.url, "gid=m-1-1&gid=m-1-2")
        assert (status, body) == (
            200,
            {"branches": [{"gid": "m-1-1", "branch": "b", "state": "prepared"}], "known": False},
        )
    finally:
        await participant.stop()


@pytest.mark.parametrize("query", ["gid=x", "gid=m-1-1&gid=n-1-1", "before=1", "&".join(["gid=m-1-1"] * 101)])
async def test_questions_that_make_no_sense(query):
    participant = await start(NullManager())
    try:
        status, body = await ask(participant.url, query)
        assert (status, body["code"]) == (400, "malformed")
    finally:
        await participant.stop()
