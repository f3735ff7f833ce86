"""PostgreSQL as a resource manager, on a real server."""

import asyncio
import contextlib
import json
import re
import subprocess
import sys
import uuid
from pathlib import Path
from urllib.parse import quote

import asyncpg
import pytest
from aiohttp import web

from cluster.databases.postgres import PostgresServer
from cluster.databases.server import server_folder
from coordinator.protocol.messages import Acked, Commit, Contradicted, Prepare, Prepared, ReadOnly, Refused
from participants.manager import Unavailable
from participants.operations import Operations, Refuse
from participants.postgres import PostgresBranch, PostgresManager, PreparedSettings, Unfit
from participants.postgres_database import PostgresDatabase
from participants.postgres_names import NAME_LIMIT_BYTES, marker_statement, transaction_name
from participants.resource import Branch, State
from participants.server import start
from participants.settings import ServerSettings
from tests.integration.prepared_contract import Bench, PreparedContract, acked, prepared
from tests.integration.world import eventually
from tests.support.breaking import Breaking

pytest_plugins = ["tests.support.postgres"]

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]

operations = Operations()


@operations.operation("pay")
async def pay(branch: PostgresBranch, account: str, amount: int) -> dict:
    left = await branch.fetchval(
        "UPDATE account SET balance = balance - $2 WHERE name = $1 AND balance >= $2 RETURNING balance", account, amount
    )
    if left is None:
        raise Refuse("poor")
    return {"left": left}


@operations.operation("look")
async def look(branch: PostgresBranch, account: str) -> dict:
    return {"balance": await branch.fetchval("SELECT balance FROM account WHERE name = $1", account)}


class PostgresBench(Bench):
    late_enlisting_fails = asyncpg.UniqueViolationError

    def __init__(self, dsn, *, through=None, accept_unsafe=False, **settings):
        super().__init__()
        self.dsn, self.through, self.accept_unsafe = dsn, through or dsn, accept_unsafe
        self.settings = PreparedSettings(**settings)

    def new_manager(self):
        return PostgresManager(self.through, operations, settings=self.settings, accept_unsafe=self.accept_unsafe)

    async def held(self):
        """What is prepared in this database, whoever did it."""
        rows = await self.sql("SELECT gid FROM pg_prepared_xacts WHERE database = current_database()")
        return {row["gid"] for row in rows}

    async def _until(self, query, *arguments):
        async def holds():
            return await self.other.fetchval(query, *arguments)

        await eventually(holds, query)

    async def until_waiting_for_locks(self, count):
        await self._until(
            "SELECT count(*) >= $1 FROM pg_stat_activity"
            " WHERE datname = current_database() AND wait_event_type = 'Lock'",
            count,
        )

    async def until_active(self, text):
        await self._until(
            "SELECT count(*) > 0 FROM pg_stat_activity WHERE datname = current_database() AND state = 'active'"
            " AND pid <> pg_backend_pid() AND query LIKE '%' || $1 || '%'",
            text,
        )

    async def sql(self, statement, *arguments):
        return await self.other.fetch(statement, *arguments)

    async def balance(self, account):
        return await self.other.fetchval("SELECT balance FROM account WHERE name = $1", account)

    async def rows(self):
        rows = await self.sql("SELECT cluster, number, branch, state FROM outlast_branches ORDER BY number")
        return {
            (f"{row['cluster']}-{row['number'] >> 40}-{row['number'] & (1 << 40) - 1}", row["branch"]): row["state"]
            for row in rows
        }

    async def enlist(self, gid, branch, account, amount):
        connection = await asyncpg.connect(self.dsn)
        try:
            await connection.execute("BEGIN")
            await connection.execute("UPDATE account SET balance = balance - $2 WHERE name = $1", account, amount)
            await connection.execute(marker_statement(gid, branch))
            assert await connection.execute(f"PREPARE TRANSACTION '{transaction_name(gid, branch)}'") != "ROLLBACK"
        finally:
            await connection.close()


def prepared_name(gid, branch="b"):
    return transaction_name(gid, branch)


def prepare_as(gid, branch="b"):
    return f"PREPARE TRANSACTION '{prepared_name(gid, branch)}'"


@contextlib.asynccontextmanager
async def bench_on(dsn, **settings):
    """A bench whose tables are there, and that leaves nothing prepared."""
    bench = PostgresBench(dsn, **settings)
    bench.other = await asyncpg.connect(dsn)
    await bench.other.execute(
        "CREATE TABLE IF NOT EXISTS account(name text PRIMARY KEY, balance int NOT NULL);"
        "CREATE TABLE IF NOT EXISTS entry(id int PRIMARY KEY,"
        " account text NOT NULL CONSTRAINT entry_account REFERENCES account DEFERRABLE INITIALLY DEFERRED);"
        "INSERT INTO account VALUES ('ann', 100), ('bob', 100), ('cy', 100) ON CONFLICT DO NOTHING"
    )
    await bench.start()
    try:
        yield bench
    finally:
        await bench.stop()
        for name in await bench.held():
            await bench.other.execute(f"ROLLBACK PREPARED '{name}'")
        await bench.other.close()


@pytest.fixture
async def bench(dsn):
    async with bench_on(dsn) as bench:
        yield bench


@pytest.fixture
async def brisk(dsn):
    """One with little patience."""
    limits = {"lock_within_s": 0.2, "statement_within_s": 0.5, "work_within_s": 1.0}
    async with bench_on(dsn, **limits) as bench:
        yield bench


@contextlib.asynccontextmanager
async def breaking_before(dsn):
    """A socket before the server's own that can break connections, and the DSN of whoever is to go through it."""
    folder = dsn.partition("host=")[2].partition("&")[0]
    async with Breaking(Path(folder) / ".s.PGSQL.5432") as breaking:
        yield breaking, dsn.replace(folder, quote(str(breaking.path.parent), safe="/"))


class TestPostgres(PreparedContract):
    pass


# ------------------------------------------------------------------------------------------------ an operation's errors


@operations.operation("sql")
async def sql(branch: PostgresBranch, statements: list) -> None:
    """Tests may send SQL; nobody else should offer this."""
    for statement in statements:
        await branch.execute(statement)


@operations.operation("swallow")
async def swallow(branch: PostgresBranch) -> None:
    await branch.execute("UPDATE account SET balance = 0 WHERE name = 'ann'")
    with contextlib.suppress(asyncpg.PostgresError):
        await branch.execute("SELECT 1 / 0")


@operations.operation("give up")
async def give_up(branch: PostgresBranch) -> None:
    try:
        await branch.execute("INSERT INTO account VALUES ('ann', 1)")
    except asyncpg.UniqueViolationError:
        raise Refuse("taken") from None


@operations.operation("savepoint")
async def savepoint(branch: PostgresBranch) -> int:
    await branch.execute("UPDATE account SET balance = balance - 1 WHERE name = 'ann'")
    with contextlib.suppress(asyncpg.PostgresError):
        async with branch.transaction():
            await branch.execute("UPDATE account SET balance = 0")
            await branch.execute("SELECT 1 / 0")
    async with branch.transaction():
        await branch.executemany("UPDATE account SET balance = balance - $2 WHERE name = $1", [("ann", 1), ("bob", 1)])
    return len(await branch.fetch("SELECT * FROM account"))


@operations.operation("stall")
async def stall(branch: PostgresBranch) -> None:
    await branch.execute("UPDATE account SET balance = 0 WHERE name = 'ann'")
    await asyncio.Event().wait()


@operations.operation("defect")
def defect(branch: PostgresBranch, how: str) -> object:
    if how == "exit":
        raise SystemExit(3)
    if how == "large":
        return "x" * 40_000
    return {}[how]


UPDATE = "UPDATE account SET balance = 0 WHERE name = 'ann'"


@pytest.mark.parametrize(
    ("payload", "reason", "retryable"),
    [
        ({"op": "swallow"}, "failed_transaction", False),
        ({"op": "sql", "statements": [UPDATE, "CREATE TEMP TABLE x(a int)"]}, "not_supported", False),
        ({"op": "sql", "statements": [UPDATE, "LISTEN x"]}, "not_supported", False),
        ({"op": "sql", "statements": [UPDATE, "DECLARE c CURSOR WITH HOLD FOR SELECT 1"]}, "not_supported", False),
        ({"op": "sql", "statements": ["INSERT INTO entry VALUES (1, 'nobody')"]}, "constraint: entry_account", False),
        ({"op": "sql", "statements": ["INSERT INTO account VALUES ('ann', 1)"]}, "constraint: account_pkey", False),
        ({"op": "sql", "statements": ["SELECT pg_sleep(60)"]}, "too_slow", True),
        ({"op": "sql", "statements": ["SELECT 1 / 0"]}, "operation_failed", False),
        ({"op": "sql", "statements": [UPDATE, "DEALLOCATE ALL"]}, "not_allowed", False),
        ({"op": "stall"}, "too_slow", True),
        ({"op": "defect", "how": "exit"}, "operation_failed", False),
        ({"op": "defect", "how": "raise"}, "operation_failed", False),
        ({"op": "defect", "how": "large"}, "result_too_large", False),
        ({"op": "sql", "statements": ["SELECT pg_terminate_backend(pg_backend_pid())"]}, "connection_lost", True),
    ],
)
async def test_what_an_operation_does_wrong_loses_its_vote_and_leaves_nothing(brisk, payload, reason, retryable):
    gid = brisk.gid()
    answer = await brisk.prepare(gid, **payload)
    assert isinstance(answer, Refused)
    assert answer.reason.startswith(reason)
    assert answer.retryable is retryable
    assert await brisk.manager.in_doubt() == []
    assert await brisk.balance("ann") == 100
    assert await brisk.rows() == {(gid, "b"): "aborted"}
    # Nor does it leave anything behind for the next one.
    assert await brisk.prepare(other := brisk.gid()) == prepared(other)
    assert await brisk.commit(other) == acked(other)


@pytest.mark.parametrize("end", ["COMMIT", "ROLLBACK", "COMMIT; BEGIN", "PREPARE TRANSACTION 'stray'"])
async def test_an_operation_that_ends_its_transaction_is_found_out(bench, caplog, end):
    answer = await bench.prepare(gid := bench.gid(), op="sql", statements=[UPDATE, end])
    assert isinstance(answer, Refused)
    assert answer.reason.startswith("transaction_ended")
    assert "ALARM" in caplog.text
    assert await bench.manager.in_doubt() == []
    assert await bench.abort(gid) == acked(gid)


async def test_an_operation_may_refuse_because_of_an_error(bench, caplog):
    answer = await bench.prepare(gid := bench.gid(), op="give up")
    assert answer == Refused(gid=gid, branch="b", reason="taken")
    assert "ALARM" not in caplog.text


async def test_a_schema_that_changes_costs_one_vote(dsn):
    async with bench_on(dsn, work_connections=1) as bench:
        assert isinstance(await bench.prepare(bench.gid(), op="look", account="ann"), ReadOnly)
        await bench.other.execute("ALTER TABLE account ALTER balance TYPE bigint")
        answer = await bench.prepare(gid := bench.gid(), op="look", account="ann")
        assert answer == Refused(gid=gid, branch="b", reason="schema_changed", retryable=True)
        assert isinstance(await bench.prepare(bench.gid(), op="look", account="ann"), ReadOnly)


async def test_savepoints_are_the_operation_s_own(bench):
    gid = bench.gid()
    assert await bench.prepare(gid, op="savepoint") == prepared(gid, b"3")
    assert await bench.commit(gid) == acked(gid)
    assert (await bench.balance("ann"), await bench.balance("bob")) == (98, 99)


async def test_settings_of_one_operation_do_not_reach_the_next(dsn):
    async with bench_on(dsn, work_connections=1) as bench:
        gid = bench.gid()
        statements = ["SET search_path TO nowhere", "SET standard_conforming_strings TO off", UPDATE]
        assert isinstance(await bench.prepare(gid, op="sql", statements=statements[:2]), ReadOnly)
        gid = bench.gid()
        assert isinstance(await bench.prepare(gid), Prepared)
        assert await bench.commit(gid) == acked(gid)


async def test_a_lock_that_another_branch_holds_refuses_after_a_while_retryable(brisk):
    holder, other = brisk.gid(), brisk.gid()
    await brisk.prepare(holder)
    assert await brisk.prepare(other) == Refused(gid=other, branch="b", reason="locked", retryable=True)
    assert await brisk.commit(holder) == acked(holder)
    assert isinstance(await brisk.prepare(brisk.gid()), Prepared)


async def test_a_deadlock_and_a_serialization_failure_are_retryable(bench):
    ours = ["SET TRANSACTION ISOLATION LEVEL REPEATABLE READ", "SELECT * FROM account", "SELECT pg_sleep(0.5)", UPDATE]
    gid = bench.gid()
    work = asyncio.create_task(bench.prepare(gid, op="sql", statements=ours))
    await bench.until_active("pg_sleep")
    await bench.other.execute("UPDATE account SET balance = balance - 1 WHERE name = 'ann'")
    assert await work == Refused(gid=gid, branch="b", reason="serialization_failure", retryable=True)
    first = ["UPDATE account SET balance = 1 WHERE name = 'ann'", "SELECT pg_sleep(0.3)"]
    one, two = bench.gid(), bench.gid()
    turned = ["UPDATE account SET balance = 1 WHERE name = 'bob'", "SELECT pg_sleep(0.3)"]
    answers = await asyncio.gather(
        bench.prepare(one, op="sql", statements=[*first, "UPDATE account SET balance = 1 WHERE name = 'bob'"]),
        bench.prepare(two, op="sql", statements=[*turned, "UPDATE account SET balance = 1 WHERE name = 'ann'"]),
    )
    refused = [each for each in answers if isinstance(each, Refused)]
    # The victim is refused as such; the other one then waits for a prepared branch, or has won.
    assert {each.reason for each in refused} <= {"deadlock", "locked"}
    assert any(each.reason == "deadlock" and each.retryable for each in refused)


async def test_branches_that_wait_for_a_lock_do_not_keep_the_commit_out_that_frees_it(dsn):
    async with bench_on(dsn, work_connections=2, finish_connections=1, acquire_within_s=0.5) as bench:
        holder = bench.gid()
        await bench.prepare(holder)
        waiting = [asyncio.create_task(bench.prepare(bench.gid())) for _ in range(2)]
        await bench.until_waiting_for_locks(2)
        busy = await bench.prepare(late := bench.gid())
        assert busy == Refused(gid=late, branch="b", reason="busy", retryable=True)
        assert await bench.commit(holder) == acked(holder)
        answers = await asyncio.gather(*waiting)
        assert sorted(type(each).__name__ for each in answers) == ["Prepared", "Refused"]


# ------------------------------------------------------------------------------------------------ who else is there


async def test_names_that_are_not_ours_are_not_touched(bench, postgres):
    elsewhere = await postgres.create_database(f"elsewhere_{uuid.uuid4().hex[:8]}")
    other = await asyncpg.connect(elsewhere)
    gid = bench.gid()
    await other.execute(f"CREATE TABLE x(a int); BEGIN; INSERT INTO x VALUES (1); {prepare_as(gid)}")
    await bench.other.execute("BEGIN; UPDATE account SET balance = 7 WHERE name = 'cy'; PREPARE TRANSACTION 'theirs'")
    odd = "outlast:shop-1-01:b"
    await bench.other.execute(f"BEGIN; UPDATE account SET balance = 7 WHERE name = 'bob'; PREPARE TRANSACTION '{odd}'")
    assert await bench.manager.in_doubt() == []
    # The name is taken, in a database that is none of ours: never assume that it is our branch.
    assert await bench.prepare(gid) == Refused(gid=gid, branch="b", reason="name_in_use")
    assert await bench.abort(gid) == acked(gid)
    assert await bench.restart() == []
    left = await other.fetch(
        "SELECT gid FROM pg_prepared_xacts WHERE gid = ANY($1)", [prepared_name(gid), "theirs", odd]
    )
    assert {row["gid"] for row in left} == {prepared_name(gid), "theirs", odd}
    await other.execute(f"ROLLBACK PREPARED '{prepared_name(gid)}'")
    await other.close()


async def test_the_longest_names_can_be_prepared_and_a_commit_goes_alone(bench):
    gid = bench.gid()
    for plain in ("b", "é'\\;"):  # what cannot stand there as it is takes three characters for a byte
        start = len(transaction_name(gid, ""))
        branch = plain * ((NAME_LIMIT_BYTES - start) // (len(transaction_name(gid, plain)) - start))
        name = transaction_name(gid, branch)
        pay = json.dumps({"op": "pay", "account": "ann", "amount": 1}).encode()
        assert isinstance(await bench.send(Prepare(gid=gid, branch=branch, payload=pay)), Prepared)
        assert name in await bench.held()
        async with bench.other.transaction():
            with pytest.raises(asyncpg.ActiveSQLTransactionError):
                await bench.other.execute(f"COMMIT PREPARED '{name}'")
        assert await bench.send(Commit(gid=gid, branch=branch)) == Acked(gid=gid, branch=branch)
    assert await bench.balance("ann") == 98


@pytest.mark.parametrize("isolation", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize("begins", ["before", "after"])
async def test_no_marker_comes_to_be_once_its_tombstone_is_forgotten(bench, monkeypatch, isolation, begins):
    """Whatever the application's transaction still sees, which began before the abort or after it."""
    gid = bench.gid()
    for moment in ("before", "after"):
        if moment == begins:
            late = await asyncpg.connect(bench.dsn)
            await late.execute(f"BEGIN ISOLATION LEVEL {isolation}; UPDATE account SET balance = 1 WHERE name = 'cy'")
        if moment == "before":
            assert await bench.abort(gid) == acked(gid)
    floor = bench.gid()
    await bench.prepare(floor, floor=floor, op="look", account="ann")
    await bench.manager.tidy()
    await bench.manager.tidy()
    assert set(await bench.rows()) == {(floor, "b")}
    if begins == "before":
        monkeypatch.setattr("participants.postgres_names._YOUNG", "0 seconds")
    with pytest.raises(asyncpg.NotNullViolationError):
        await late.execute(f"{marker_statement(gid, 'b')}; {prepare_as(gid)}")
    await late.close()
    assert await bench.held() == set()


async def test_a_branch_that_another_user_prepared_is_an_alarm(bench, postgres):
    user = f"user_{uuid.uuid4().hex[:8]}"
    await bench.other.execute(
        f"CREATE USER {user}; GRANT USAGE ON SCHEMA public TO {user};"
        f" GRANT ALL ON ALL TABLES IN SCHEMA public TO {user}"
    )
    theirs = await asyncpg.connect(bench.dsn, user=user)
    gid = bench.gid()
    await theirs.execute(f"BEGIN; UPDATE account SET balance = 1; {marker_statement(gid, 'b')}; {prepare_as(gid)}")
    assert await bench.manager.in_doubt() == []
    for message in (bench.prepare(gid, op="outlast.enlisted"), bench.commit(gid), bench.abort(gid)):
        with pytest.raises(Unavailable, match=f"ALARM: .* user {user}"):
            await message
    await theirs.execute(f"ROLLBACK PREPARED '{prepared_name(gid)}'")
    await theirs.close()
    assert await bench.abort(gid) == acked(gid)


@pytest.mark.parametrize("how", ["SET LOCAL ROLE", "SET ROLE"])
async def test_what_an_operation_did_in_another_role_is_still_the_participant_s_to_finish(dsn, postgres, how):
    plain, role = (f"user_{uuid.uuid4().hex[:8]}" for _ in range(2))
    async with bench_on(dsn) as owner:
        await owner.other.execute(
            f"CREATE USER {plain}; CREATE ROLE {role}; GRANT {role} TO {plain};"
            f" GRANT USAGE ON SCHEMA public TO {plain}, {role}; GRANT ALL ON account TO {role};"
            f" GRANT ALL ON outlast_branches, outlast_horizons TO {plain}"
        )
        bench = PostgresBench(postgres.dsn("test", user=plain))
        bench.other = owner.other
        await bench.start()
        gid, aborted, read = bench.gid(), bench.gid(), bench.gid()
        for each, change in ((gid, UPDATE), (aborted, UPDATE.replace("ann", "bob"))):
            vote = await bench.prepare(each, op="sql", statements=[f"{how} {role}", change])
            assert vote == prepared(each, None)
        vote = await bench.prepare(read, op="sql", statements=[f"{how} {role}", "SELECT * FROM account"])
        assert isinstance(vote, ReadOnly)
        # A restart finds them: they are listed as this user's own.
        assert {each.gid for each in await bench.restart()} == {gid, aborted}
        assert await bench.commit(gid) == acked(gid)
        assert await bench.abort(aborted) == acked(aborted)
        assert (await bench.balance("ann"), await bench.balance("bob")) == (0, 100)
        await bench.stop()


@pytest.mark.parametrize("isolation", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
async def test_a_branch_that_changed_nothing_is_heard_of_by_nobody(bench, isolation):
    """Under SERIALIZABLE it has to be committed for its reads to be true; that is told in the manual."""
    heard = []
    await bench.other.add_listener("news", lambda *told: heard.append(told[-1]))
    begin = f"SET TRANSACTION ISOLATION LEVEL {isolation}"
    vote = await bench.prepare(gid := bench.gid(), op="sql", statements=[begin, "NOTIFY news, 'escaped'"])
    assert isinstance(vote, ReadOnly)
    assert await bench.rows() == {(gid, "b"): "read_only"}
    # The server tells in the order of commits, so this one is heard of last.
    await bench.other.execute("NOTIFY news, 'end'")
    await eventually(lambda: "end" in heard, "the last is heard")
    assert heard == (["escaped", "end"] if isolation == "SERIALIZABLE" else ["end"])


async def test_what_somebody_ended_by_hand_is_an_alarm_or_the_truth(bench, caplog):
    rolled_back, committed = bench.gid(), bench.gid()
    await bench.prepare(rolled_back)
    await bench.other.execute(f"ROLLBACK PREPARED '{prepared_name(rolled_back)}'")
    await bench.prepare(committed, op="pay", account="bob", amount=1)
    await bench.other.execute(f"COMMIT PREPARED '{prepared_name(committed)}'")
    assert await bench.commit(committed) == acked(committed)
    assert "ALARM" not in caplog.text
    assert await bench.commit(rolled_back) == Contradicted(gid=rolled_back, branch="b", state="unknown")
    assert "by hand" in caplog.text


async def test_two_that_finish_at_once_both_succeed(bench):
    """Also two participants on one database."""
    other = PostgresBench(bench.dsn)
    await other.start()
    for number in range(40):
        gid = bench.gid()
        await bench.prepare(gid, op="pay", account="ann", amount=1)
        if number % 2:
            answers = await asyncio.gather(bench.commit(gid), other.commit(gid))
        else:
            answers = await asyncio.gather(bench.abort(gid), other.abort(gid))
        assert answers == [acked(gid)] * 2
    assert await bench.balance("ann") == 80
    await other.stop()


# ------------------------------------------------------------------------------------------------ zombies and kills


async def test_prepared_branches_and_their_locks_survive_kill_9_of_the_server(bench, postgres):
    kept, dropped = bench.gid(), bench.gid()
    await bench.prepare(kept)
    await bench.prepare(dropped, op="pay", account="bob", amount=1)
    await postgres.kill()
    with pytest.raises(Unavailable):
        await bench.commit(kept)
    with pytest.raises(Unavailable):
        await bench.prepare(bench.gid())
    with pytest.raises(Unavailable):
        await bench.manager.in_doubt()
    await postgres.start()
    assert [each.gid for each in await bench.manager.in_doubt()] == [kept, dropped]
    assert await bench.commit(kept) == acked(kept)
    assert await bench.abort(dropped) == acked(dropped)
    bench.other = await asyncpg.connect(bench.dsn)
    assert (await bench.balance("ann"), await bench.balance("bob")) == (90, 100)


async def test_no_abort_is_acked_while_a_zombie_may_still_prepare(brisk):
    """A holder has the key, the zombie waits for it: whoever comes first, the aborted branch is not prepared."""
    gid = brisk.gid()
    holder, zombie = await asyncpg.connect(brisk.dsn), await asyncpg.connect(brisk.dsn)
    await holder.execute(f"BEGIN; {marker_statement(gid, 'b')}; SET LOCAL application_name TO 'somebody'")
    await zombie.execute("BEGIN; UPDATE account SET balance = 1 WHERE name = 'ann'")
    late = asyncio.create_task(zombie.execute(f"{marker_statement(gid, 'b')}; {prepare_as(gid)}"))
    await brisk.until_waiting_for_locks(1)
    with pytest.raises(Unavailable, match="held by a transaction"):
        await brisk.abort(gid)
    # It is named, so it was ended; the holder is somebody else's, so it was not.
    with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
        await late
    assert not holder.is_closed()
    await holder.execute("ROLLBACK")
    assert await brisk.abort(gid) == acked(gid)
    assert await brisk.manager.in_doubt() == []
    with pytest.raises(asyncpg.UniqueViolationError):
        await brisk.enlist(gid, "b", "ann", 1)
    await holder.close()


async def test_a_zombie_that_did_prepare_is_rolled_back_by_the_abort(bench):
    gid = bench.gid()
    assert isinstance(await bench.prepare(gid, epoch=1), Prepared)
    await bench.restart()
    await bench.enlist(other := bench.gid(), "b", "bob", 1)
    assert await bench.abort(gid) == acked(gid)
    assert await bench.abort(other) == acked(other)
    assert await bench.manager.in_doubt() == []


async def test_what_is_prepared_without_its_marker_after_an_abort_is_rolled_back(bench):
    gid = bench.gid()
    assert await bench.abort(gid) == acked(gid)
    await bench.other.execute(f"BEGIN; UPDATE account SET balance = 7 WHERE name = 'ann'; {prepare_as(gid)}")
    assert [each.gid for each in await bench.manager.in_doubt()] == [gid]
    assert await bench.commit(gid) == Contradicted(gid=gid, branch="b", state="aborted")
    assert await bench.held() == set()
    assert await bench.abort(gid) == acked(gid)


@pytest.mark.parametrize("reaches", [True, False])
async def test_a_connection_that_breaks_during_the_prepare_leaves_it_unknown_until_one_looks(dsn, tmp_path, reaches):
    async with breaking_before(dsn) as (breaking, through), bench_on(dsn, through=through) as bench:
        gid = bench.gid()
        breaking.at(b"PREPARE TRANSACTION", reaches=reaches)
        with pytest.raises(Unavailable, match="the connection was lost while the branch was prepared"):
            await bench.prepare(gid)
        assert breaking.broke
        assert (await bench.held() == {prepared_name(gid)}) is reaches
        # Whichever it was: repeated, the vote is the truth, and the work is done once.
        assert isinstance(await bench.prepare(gid), Prepared)
        breaking.at(b"COMMIT PREPARED", reaches=reaches)
        with pytest.raises(Unavailable):
            await bench.commit(gid)
        assert await bench.commit(gid) == acked(gid)
        assert await bench.balance("ann") == 90


def take_the_row(dsn):
    """Returns when ann's row is free, and blocks everything here until then."""
    code = "import asyncio, asyncpg, sys\nasync def main():\n    c = await asyncpg.connect(sys.argv[1])\n"
    code += "    await c.execute('UPDATE account SET balance = 7 WHERE name = $1', 'ann')\nasyncio.run(main())"
    subprocess.run([sys.executable, "-c", code, dsn], timeout=60, check=True)


async def test_a_participant_that_stands_still_holds_no_locks_for_long(brisk):
    """Its backend ends by itself, while the whole event loop waits for that."""
    name = f"freeze-{uuid.uuid4().hex}"

    @operations.operation(name)
    async def freeze(branch: PostgresBranch) -> None:
        await branch.execute("UPDATE account SET balance = 0 WHERE name = 'ann'")
        take_the_row(brisk.dsn)

    gid = brisk.gid()
    with contextlib.suppress(Unavailable):  # it is told that its connection is gone sooner or later
        assert isinstance(await brisk.prepare(gid, op=name), Refused)
    assert await brisk.balance("ann") == 7
    assert await brisk.abort(gid) == acked(gid)
    assert await brisk.held() == set()


async def test_an_orphan_under_our_prefix_is_swept_up_and_a_foreign_one_is_not(bench):
    await bench.other.execute("BEGIN; UPDATE account SET balance = 7 WHERE name = 'cy'; PREPARE TRANSACTION 'theirs'")

    async def outcome(request):
        gid = request.match_info["gid"]
        if gid.endswith("-77"):
            return web.json_response({"code": "forgotten"}, status=410)
        return web.json_response({"outcome": "aborted"})

    app = web.Application()
    app.router.add_get("/v1/outcomes/{gid}", outcome)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    node = f"http://127.0.0.1:{runner.addresses[0][1]}"
    settings = ServerSettings(coordinators=(node,), sweep_every_s=0.05, in_doubt_after_s=0.01)
    served = await start(bench.new_manager(), settings=settings)
    try:
        await bench.enlist("shop-1-50", "b", "ann", 1)
        await bench.enlist("shop-1-77", "b", "bob", 1)

        async def swept():
            held, rows = await bench.held(), await bench.rows()
            return held == {"theirs", prepared_name("shop-1-77")} and rows == {("shop-1-50", "b"): "aborted"}

        await eventually(swept, "the orphan is rolled back")
    finally:
        await served.stop()
        await runner.cleanup()
    # 410 is an alarm, never a decision.
    assert await bench.held() == {"theirs", prepared_name("shop-1-77")}


async def test_the_manual_s_queries_show_what_they_should(bench):
    text = (Path(__file__).parents[2] / "docs" / "POSTGRESQL.md").read_text()
    blocks = re.findall(r"^```sql\n(.*?)^```$", text.partition("## What to watch")[2], re.MULTILINE | re.DOTALL)
    doubts, waiting, locks, slots, rows = [each for block in blocks for each in block.split(";\n") if each.strip()]
    gid = bench.gid()
    await bench.prepare(gid)
    late = asyncio.create_task(bench.prepare(bench.gid()))
    await bench.until_waiting_for_locks(1)
    assert [row["gid"] for row in await bench.sql(doubts)] == [prepared_name(gid)]
    assert "UPDATE account" in (await bench.sql(waiting))[0]["query"]
    assert (prepared_name(gid), "account") in {(row["gid"], row["relation"]) for row in await bench.sql(locks)}
    assert (await bench.sql(slots))[0]["used"] >= 1
    assert await bench.sql(rows) == []
    await bench.commit(gid)
    await late
    assert (await bench.sql(rows))[0]["count"] == 1


async def test_what_stays_prepared_keeps_the_database_and_new_logical_slots_from_being_dropped_and_made():
    server = PostgresServer(server_folder("outlast-pg-"), settings={"wal_level": "logical"})
    try:
        await server.start()
        dsn = await server.create_database("leaving")
        owner = await asyncpg.connect(server.dsn())
        async with bench_on(dsn) as bench:
            gid = bench.gid()
            await bench.prepare(gid)
        assert await owner.fetchval("SELECT count(*) FROM pg_prepared_xacts") == 0, "the bench leaves nothing"
        bench = PostgresBench(dsn)
        await bench.enlist(gid, "b", "ann", 1)
        with pytest.raises(asyncpg.ObjectInUseError) as denied:
            await owner.execute("DROP DATABASE leaving")
        assert "prepared transaction" in denied.value.detail
        slot = "SELECT pg_create_logical_replication_slot('slot', 'pgoutput')"
        await owner.execute("SET statement_timeout = '300ms'")
        with pytest.raises(asyncpg.QueryCanceledError):
            await owner.execute(slot)
        finisher = await asyncpg.connect(dsn)
        await finisher.execute(f"ROLLBACK PREPARED '{prepared_name(gid)}'")
        await finisher.close()
        await owner.execute("SET statement_timeout = 0")
        await owner.execute(slot)
        await owner.execute("DROP DATABASE leaving")
        await owner.close()
    finally:
        await server.stop()
        server.remove()


# ------------------------------------------------------------------------------------------------ the start


async def test_a_server_that_is_not_fit_is_told_what_to_change():
    server = PostgresServer(server_folder("outlast-pg-"), settings={"max_prepared_transactions": "0", "fsync": "off"})
    try:
        await server.start()
        with pytest.raises(Unfit, match="ALTER SYSTEM SET max_prepared_transactions"):
            await PostgresManager(server.dsn(), operations).open()
        await server.kill()
        server.settings["max_prepared_transactions"] = "1"
        await server.start()
        with pytest.raises(Unfit, match="fsync"):
            await PostgresManager(server.dsn(), operations).open()
        async with bench_on(server.dsn(), accept_unsafe=True) as bench:
            gid, more = bench.gid(), bench.gid()
            await bench.prepare(gid)
            refused = await bench.prepare(more, op="pay", account="bob", amount=1)
            assert refused == Refused(gid=more, branch="b", reason="too_many_prepared", retryable=True)
            assert await bench.commit(gid) == acked(gid)
        connection = await asyncpg.connect(server.dsn())
        await connection.execute("CREATE USER poor; DROP TABLE outlast_branches; DROP TABLE outlast_horizons")
        await connection.close()
        poor = PostgresManager(server.dsn(user="poor"), operations, accept_unsafe=True)
        with pytest.raises(Unfit, match="GRANT USAGE, CREATE ON SCHEMA"):
            await poor.open()
        await poor.close()
        server.settings |= {"fsync": "on", "synchronous_commit": "off"}
        await server.kill()
        await server.start()
        async with bench_on(server.dsn()) as bench:
            refused = await bench.prepare(bench.gid(), op="setting")
            assert refused.reason == "synchronous_commit is on"
    finally:
        await server.kill()
        server.remove()


@operations.operation("setting")
async def setting(branch: PostgresBranch) -> None:
    raise Refuse(f"synchronous_commit is {await branch.fetchval('SHOW synchronous_commit')}")


async def test_a_server_with_too_few_connections_is_told_what_to_change(dsn):
    manager = PostgresManager(dsn, operations, settings=PreparedSettings(work_connections=190))
    with pytest.raises(Unfit, match="may open 206: as a superuser run ALTER SYSTEM SET max_connections = 412"):
        await manager.open()
    await manager.close()


async def test_what_cannot_be_connected_with_is_told_without_its_password(dsn):
    for wrong, error in (
        ("mysql://ann:secret@db/shop", Unfit),
        ("postgresql://ann:secret@127.0.0.1:1/shop", Unavailable),
        (dsn.replace("/test?", "/no_such?"), Unfit),
    ):
        manager = PostgresManager(wrong, operations)
        with pytest.raises(error) as caught:
            await manager.open()
        assert "secret" not in str(caught.value)
        await manager.close()


async def test_without_the_driver_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "asyncpg", None)
    for name in [each for each in sys.modules if each.startswith("participants.postgres_")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(Unfit, match=r"pip install 'outlast\[postgres\]'"):
        PostgresManager("postgresql://db/shop", operations)


# ------------------------------------------------------------------------------------------------ known-bad variants


PLACE = f"{__name__}.PostgresManager"


class WithoutTombstones(PostgresDatabase):
    async def bury(self, gid, branch, record):
        return True


class WithoutMarkers(PostgresDatabase):
    async def look(self, gid, branch):
        found = await super().look(gid, branch)
        return Branch() if found.state is State.COMMITTED else found


class BelievesUnknown(PostgresDatabase):
    """ "No such prepared transaction" taken for "it is done"."""

    async def commit(self, gid, branch):
        await super().commit(gid, branch)
        return True


class PrunesTooSoon(PostgresManager):
    async def tidy(self):
        await self._save_horizons()
        await super().tidy()


@pytest.mark.parametrize(
    ("bad", "caught_by"),
    [
        (WithoutTombstones, PreparedContract.test_an_abort_before_the_prepare_leaves_a_tombstone),
        (WithoutMarkers, PreparedContract.test_every_message_may_come_twice_and_after_a_restart),
        (BelievesUnknown, lambda _, bench: test_what_somebody_ended_by_hand_is_an_alarm_or_the_truth(bench, Silent())),
        (PrunesTooSoon, PreparedContract.test_below_the_floor_records_are_forgotten_and_nothing_new_begins),
    ],
)
async def test_the_contract_catches_who_breaks_it(dsn, monkeypatch, bad, caught_by):
    where = "participants.postgres_database.PostgresDatabase" if issubclass(bad, PostgresDatabase) else PLACE
    monkeypatch.setattr(where, bad)
    with pytest.raises(AssertionError):
        async with bench_on(dsn) as bench:
            await caught_by(PreparedContract(), bench)


class Silent:
    text = ""
