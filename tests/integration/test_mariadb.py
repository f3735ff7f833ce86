"""MariaDB as a resource manager, on a real server."""

import asyncio
import re
from pathlib import Path

import asyncmy
import pytest
from aiohttp import web

from coordinator.protocol.messages import Contradicted, Prepared, ReadOnly, Refused
from participants.manager import Unavailable
from participants.mariadb import MariaDbBranch, MariaDbManager, MariaDbSettings
from participants.mariadb_names import marker_statement, xid_of
from participants.mariadb_owners import Owners
from participants.operations import Operations, Refuse
from participants.prepared import Unfit
from participants.server import start
from participants.settings import ServerSettings
from tests.integration.prepared_contract import Bench, PreparedContract, acked, prepared
from tests.integration.world import eventually
from tests.support.breaking import Breaking
from tests.support.mariadb import connect, innodb_shows, new_server

RESET_CONNECTION = 0x1F

pytest_plugins = ["tests.support.mariadb_fixtures"]

operations = Operations()


@operations.operation("pay")
async def pay(branch: MariaDbBranch, account: str, amount: int) -> dict:
    changed = await branch.execute(
        "UPDATE account SET balance = balance - %s WHERE name = %s AND balance >= %s", (amount, account, amount)
    )
    if not changed:
        raise Refuse("poor")
    return {"left": (await branch.one("SELECT balance FROM account WHERE name = %s", (account,)))[0]}


@operations.operation("look")
async def look(branch: MariaDbBranch, account: str) -> dict:
    return {"balance": (await branch.one("SELECT balance FROM account WHERE name = %s", (account,)))[0]}


@operations.operation("add")
async def add(branch: MariaDbBranch, account: str, calmly: bool = False) -> None:
    """Takes from ann, then opens an account. calmly: whatever that says."""
    await branch.execute("UPDATE account SET balance = balance - 1 WHERE name = 'ann'")
    try:
        await branch.execute("INSERT INTO account VALUES (%s, 0)", (account,))
    except asyncmy.errors.MySQLError:
        if not calmly:
            raise


@operations.operation("sql")
async def sql(branch: MariaDbBranch, statements: list) -> None:
    for statement in statements:
        await branch.execute(statement)


held = set()
"""The first accounts of those that `hold` two."""


@operations.operation("hold")
async def hold(branch: MariaDbBranch, account: str, other: str) -> None:
    """Two accounts, the second when somebody holds it."""
    raised = "UPDATE account SET balance = balance + 1 WHERE name = %s"
    await branch.execute(raised, (account,))
    held.add(account)
    await eventually(lambda: other in held, f"somebody holds {other}")
    await branch.execute(raised, (other,))


class MariaDbBench(Bench):
    late_enlisting_fails = asyncmy.errors.IntegrityError

    def __init__(self, server, database, **settings):
        super().__init__()
        self.server, self.database, self.user = server, database, "root"
        self.left_alone, self.socket = (), server.socket
        self.settings = MariaDbSettings(**settings)

    @property
    def dsn(self):
        return f"mariadb://{self.user}@localhost/{self.database}?socket={self.socket}"

    def new_manager(self):
        return MariaDbManager(self.dsn, operations, settings=self.settings, left_alone=self.left_alone)

    async def connect(self):
        return await connect(self.server, self.database)

    async def sql(self, *statements):
        return await self.other.run(*statements)

    async def balance(self, account):
        return (await self.sql(f"SELECT balance FROM account WHERE name = '{account}'"))[0][0]

    async def rows(self):
        rows = await self.sql("SELECT cluster, number, branch, state FROM outlast_branches ORDER BY number")
        return {(f"{row[0]}-{row[1] >> 40}-{row[1] & (1 << 40) - 1}", row[2]): row[3] for row in rows}

    async def enlist(self, gid, branch, account, amount):
        await (await self.enlisted(gid, branch, account, amount)).close()

    async def enlisted(self, gid, branch, account, amount):
        """The application's connection, which has prepared the branch."""
        connection = await self.connect()
        xid = xid_of(gid, branch, database=self.database, connection=connection.id).sql
        try:
            await connection.run(
                f"XA START {xid}",
                f"UPDATE account SET balance = balance - {amount} WHERE name = '{account}'",
                marker_statement(gid, branch, database=self.database, connection=connection.id),
                f"XA END {xid}",
                f"XA PREPARE {xid}",
            )
        except BaseException:
            await connection.close()
            raise
        return connection

    async def server_restarts(self):
        self.other.raw.close()
        await self.server.kill()
        await self.server.start()
        self.other = await self.connect()


ACCOUNTS = (
    "CREATE TABLE account(name varchar(20) PRIMARY KEY, balance int NOT NULL) ENGINE=InnoDB",
    "INSERT INTO account VALUES ('ann', 100), ('bob', 100), ('cy', 100)",
)


async def stocked(server, database, **settings):
    """A bench whose manager is open."""
    bench = MariaDbBench(server, database, **settings)
    bench.other = await bench.connect()
    await bench.sql(*ACCOUNTS)
    await bench.start()
    return bench


async def emptied(bench):
    """Everything that it has prepared is aborted."""
    await bench.restart()
    for each in await bench.manager.in_doubt():
        await bench.abort(each.gid)
    await bench.stop()
    left = await bench.sql("XA RECOVER")
    await bench.other.close()
    assert left == []


@pytest.fixture
async def bench(mariadb, mariadb_database):
    bench = await stocked(mariadb, mariadb_database)
    yield bench
    await emptied(bench)


class TestMariaDb(PreparedContract):
    pass


# ------------------------------------------------------------------------------------------- how it votes


async def test_any_error_of_a_statement_is_a_vote_no_even_if_it_is_caught(bench):
    for calmly in (False, True):
        gid = bench.gid()
        answer = await bench.prepare(gid, op="add", account="bob", calmly=calmly)
        assert answer == Refused(gid=gid, branch="b", reason="constraint: duplicate key (PRIMARY)")
    assert await bench.sql("XA RECOVER") == []
    assert await bench.balance("ann") == 100
    assert await bench.prepare(bench.gid(), op="add", account="dan") is not None


async def test_a_lock_that_another_branch_holds_is_a_retryable_refusal(mariadb, mariadb_database):
    bench = await stocked(mariadb, mariadb_database, lock_within_s=1.0)
    holder, late = bench.gid(), bench.gid()
    assert isinstance(await bench.prepare(holder), Prepared)
    assert await bench.prepare(late) == Refused(gid=late, branch="b", reason="locked", retryable=True)
    assert await bench.commit(holder) == acked(holder)
    assert isinstance(await bench.prepare(bench.gid()), Prepared)
    await emptied(bench)


async def test_a_deadlock_is_a_retryable_refusal_of_one_of_the_two(bench):
    gids = [bench.gid(), bench.gid()]
    held.clear()
    answers = await asyncio.gather(
        bench.prepare(gids[0], op="hold", account="ann", other="bob"),
        bench.prepare(gids[1], op="hold", account="bob", other="ann"),
        return_exceptions=True,
    )
    refused = [each for each in answers if isinstance(each, Refused)]
    assert [(each.reason, each.retryable) for each in refused] in ([("deadlock", True)], [("locked", True)])
    assert sum(isinstance(each, Prepared) for each in answers) == 1


@pytest.mark.parametrize(
    "statement",
    [
        *("COMMIT", "XA END 'x'", "/* hidden */ BEGIN", "SET autocommit = 1", "CREATE TABLE u(i int)", "LOCK TABLES u"),
        *("UPDATE account SET balance = 0; COMMIT", "/*!50000 COMMIT */", ""),
    ],
)
async def test_what_is_not_about_rows_is_not_for_an_operation(bench, statement):
    answer = await bench.prepare(
        bench.gid(), op="sql", statements=["UPDATE account SET balance = 1 WHERE name = 'cy'", statement]
    )
    assert isinstance(answer, Refused)
    assert not answer.retryable
    assert await bench.sql("XA RECOVER") == []
    assert await bench.balance("cy") == 100


async def test_a_query_whose_function_writes_is_no_read_only_branch(bench):
    await bench.sql(
        "CREATE FUNCTION f() RETURNS int MODIFIES SQL DATA"
        " BEGIN UPDATE account SET balance = 7 WHERE name = 'cy'; RETURN 1; END"
    )
    writes, reads, locks, same = (bench.gid() for _ in range(4))
    assert isinstance(await bench.prepare(writes, op="sql", statements=["SELECT f()"]), Prepared)
    assert isinstance(await bench.prepare(reads, op="sql", statements=["SELECT COUNT(*) FROM account"]), ReadOnly)
    query = "SELECT * FROM account WHERE name = 'ann' FOR UPDATE"
    assert isinstance(await bench.prepare(locks, op="sql", statements=[query]), Prepared), "it keeps its lock"
    change = "UPDATE account SET balance = balance WHERE name = 'bob'"
    assert isinstance(await bench.prepare(same, op="sql", statements=[change]), Prepared)
    await bench.commit(writes)
    assert await bench.balance("cy") == 7


async def test_work_that_takes_too_long_is_refused_and_its_connection_ended(mariadb, mariadb_database):
    bench = await stocked(
        mariadb, mariadb_database, work_within_s=1.2, statement_within_s=1.1, lock_within_s=1.0, prune_every_s=1.2
    )
    gid = bench.gid()
    answer = await bench.prepare(gid, op="sql", statements=["SELECT SLEEP(30)"])
    assert isinstance(answer, Refused)
    assert (answer.reason, answer.retryable) == ("too_slow", True)

    async def gone():
        return not await bench.sql("SELECT 1 FROM information_schema.processlist WHERE info LIKE 'SELECT SLEEP%'")

    await eventually(gone, "nobody sleeps")
    await emptied(bench)


# ------------------------------------------------------------------------------------------- whose a branch is


async def test_the_server_is_killed_between_prepare_and_decision(bench):
    kept, dropped = bench.gid(), bench.gid()
    await bench.prepare(kept)
    await bench.prepare(dropped, op="pay", account="bob", amount=1)
    await bench.server_restarts()
    assert await bench.commit(kept) == acked(kept)
    assert await bench.abort(dropped) == acked(dropped)
    assert (await bench.balance("ann"), await bench.balance("bob")) == (90, 100)
    # Its other connections are gone as well, and nobody notices.
    assert isinstance(await bench.prepare(bench.gid()), Prepared)


async def test_beyond_the_pinned_connections_the_oldest_branches_are_let_go_of(mariadb, mariadb_database):
    bench = await stocked(mariadb, mariadb_database, pinned_connections=3, work_connections=4, finish_connections=2)
    await bench.sql("CREATE TABLE slot(id int PRIMARY KEY) ENGINE=InnoDB")
    gids = [bench.gid() for _ in range(24)]
    for number, gid in enumerate(gids):
        answer = await bench.prepare(gid, op="sql", statements=[f"INSERT INTO slot VALUES ({number})"])
        assert isinstance(answer, Prepared)
    used = await bench.sql(f"SELECT COUNT(*) FROM information_schema.processlist WHERE db = '{bench.database}'")
    assert used[0][0] <= 3 + 4 + 2 + 2 + 1, "one is the test's own"
    decide = [bench.commit if number % 3 else bench.abort for number in range(24)]
    answers = await asyncio.gather(*(each(gid) for each, gid in zip(decide, gids, strict=True)))
    assert list(answers) == [acked(gid) for gid in gids]
    assert len(await bench.sql("SELECT * FROM slot")) == 16
    await emptied(bench)


async def test_an_application_that_stays_connected_is_cut_off(bench):
    kept, dropped = bench.gid(), bench.gid()
    connections = [await bench.enlisted(kept, "b", "ann", 10), await bench.enlisted(dropped, "b", "bob", 10)]
    assert await bench.prepare(kept, op="outlast.enlisted") == prepared(kept, None)
    assert await bench.prepare(dropped, op="outlast.enlisted") == prepared(dropped, None)
    assert await bench.commit(kept) == acked(kept)
    assert await bench.abort(dropped) == acked(dropped)
    assert (await bench.balance("ann"), await bench.balance("bob")) == (90, 100)
    for connection in connections:
        assert await connection.error("SELECT 1") in (2006, 2013, 1927)
        connection.raw.close()


async def test_an_application_that_leaves_out_the_marker_gets_one(bench):
    gid = bench.gid()
    connection = await bench.connect()
    xid = xid_of(gid, "b", database=bench.database, connection=connection.id).sql
    change = "UPDATE account SET balance = 1 WHERE name = 'ann'"
    await connection.run(f"XA START {xid}", change, f"XA END {xid}", f"XA PREPARE {xid}")
    await connection.close()
    assert await bench.prepare(gid, op="outlast.enlisted") == prepared(gid, None)
    assert await bench.commit(gid) == acked(gid)
    assert await bench.rows() == {(gid, "b"): "committed"}


async def reset(connection):
    """What a pool does to a connection that comes back."""
    await connection.raw._execute_command(RESET_CONNECTION, b"")
    await connection.raw._read_ok_packet()


@pytest.mark.parametrize("decision", ["commit", "abort"])
async def test_a_branch_whose_connection_was_reset_is_finished_all_the_same(bench, decision):
    gid = bench.gid()
    connection = await bench.enlisted(gid, "b", "ann", 10)
    await bench.prepare(gid, op="outlast.enlisted")
    await reset(connection)
    assert await (bench.commit if decision == "commit" else bench.abort)(gid) == acked(gid)
    assert await bench.balance("ann") == (90 if decision == "commit" else 100)
    connection.raw.close()


@pytest.mark.parametrize("decision", ["commit", "abort"])
async def test_what_the_server_only_acknowledges_is_no_ack(mariadb, mariadb_database, monkeypatch, decision):
    """Known bad: an adapter that does not wait until the owner has let go. The marker catches it."""

    async def nobody(_):
        return frozenset()

    bench = await stocked(mariadb, mariadb_database, lock_within_s=1.0)
    gid = bench.gid()
    connection = await bench.enlisted(gid, "b", "ann", 10)
    await bench.prepare(gid, op="outlast.enlisted")
    await reset(connection)
    decide = bench.commit if decision == "commit" else bench.abort
    with monkeypatch.context() as patch:
        patch.setattr(Owners, "now", nobody)
        with pytest.raises(Unavailable, match="restart MariaDB" if decision == "commit" else "could not be ended"):
            await decide(gid)
    assert await bench.balance("ann") == 100
    connection.raw.close()
    await bench.server_restarts()
    assert await decide(gid) == acked(gid)
    assert await bench.balance("ann") == (90 if decision == "commit" else 100)
    await emptied(bench)


async def test_the_same_branch_of_another_database_is_left_alone(bench, mariadb):
    await mariadb.create_database(f"{bench.database}_b")
    other = await stocked(mariadb, f"{bench.database}_b")
    gid = bench.gid()
    await bench.prepare(gid)
    await other.prepare(gid)
    assert len(await bench.sql("XA RECOVER")) == 2
    await bench.restart()
    assert [each.gid for each in await bench.manager.in_doubt()] == [gid]
    assert await bench.abort(gid) == acked(gid)
    await other.restart()
    assert [each.gid for each in await other.manager.in_doubt()] == [gid]
    assert await other.commit(gid) == acked(gid)
    assert (await bench.balance("ann"), await other.balance("ann")) == (100, 90)
    await emptied(other)


async def test_branches_of_strangers_are_left_alone(bench):
    stranger = await bench.connect()
    ids = [stranger.id]
    names = ("'shop-1-1'", "'shop-1-1_abcdefg_5','b'", "X'ff00','b'", f"'shop-1-1_{'x' * 40}','b'")
    for name in names:
        await stranger.run(f"XA START {name}", "INSERT INTO account VALUES (UUID_SHORT(), 1)", f"XA END {name}")
        await stranger.run(f"XA PREPARE {name}")
        await stranger.close()
        stranger = await bench.connect()
        ids.append(stranger.id)
    assert await bench.restart() == []
    assert len(await bench.sql("XA RECOVER")) == len(names)
    await stranger.close()
    owned = f"trx_mysql_thread_id IN ({', '.join(map(str, ids))})"

    async def nobody_s():
        return not await innodb_shows(bench.other, owned)

    await eventually(nobody_s, "the strangers have let go")
    for name in names:
        await bench.sql(f"XA ROLLBACK {name}")


# ------------------------------------------------------------------------------------------- late prepares


async def test_a_prepare_that_outlived_its_participant_is_ended_before_its_abort_is_acknowledged(bench):
    """It waits for a backup to end. Its client is frozen or cut off; of one that is dead the server hears by itself."""
    await bench.abort(bench.gid())  # so that the leader is known already
    gid = bench.gid()
    zombie, backup = await bench.connect(), await bench.connect()
    xid = xid_of(gid, "b", database=bench.database, connection=zombie.id).sql
    await zombie.run(
        f"XA START {xid}",
        "UPDATE account SET balance = 1 WHERE name = 'ann'",
        marker_statement(gid, "b", database=bench.database, connection=zombie.id),
        f"XA END {xid}",
    )
    await backup.run("FLUSH TABLES WITH READ LOCK")
    task = asyncio.create_task(zombie.run(f"XA PREPARE {xid}"))

    async def waits():
        return await bench.sql("SELECT 1 FROM information_schema.processlist WHERE info LIKE 'XA PREPARE%'")

    await eventually(waits, "it waits")
    abort = asyncio.create_task(bench.abort(gid))

    async def ended():
        return not await waits()

    await eventually(ended, "it is ended, although the tombstone has to wait for the backup", within_s=20.0)
    with pytest.raises(asyncmy.errors.MySQLError):
        await task
    zombie.raw.close()
    await backup.run("UNLOCK TABLES")
    assert await abort == acked(gid)
    await backup.close()
    assert await bench.sql("XA RECOVER") == []
    assert await bench.balance("ann") == 100
    assert (await bench.rows())[gid, "b"] == "aborted"


async def test_what_is_prepared_without_its_marker_after_an_abort_is_rolled_back(bench):
    gid = bench.gid()
    assert await bench.abort(gid) == acked(gid)
    late = await bench.connect()
    xid = xid_of(gid, "b", database=bench.database, connection=late.id).sql
    change = "UPDATE account SET balance = 1 WHERE name = 'ann'"
    await late.run(f"XA START {xid}", change, f"XA END {xid}", f"XA PREPARE {xid}")
    await late.close()
    await bench.restart()
    assert await bench.commit(gid) == Contradicted(gid=gid, branch="b", state="aborted")
    assert await bench.sql("XA RECOVER") == []
    assert await bench.balance("ann") == 100


async def insisted(decide, gid):
    """The answer, as a coordinator gets it: what is unknown is asked again."""
    try:
        return await decide(gid)
    except Unavailable:
        return await decide(gid)


@pytest.mark.parametrize("reaches", [True, False])
async def test_a_connection_that_breaks_leaves_it_unknown_until_one_looks(mariadb, mariadb_database, reaches):
    async with Breaking(mariadb.socket) as breaking:
        bench = MariaDbBench(mariadb, mariadb_database)
        bench.socket = breaking.path
        bench.other = await bench.connect()
        await bench.sql(*ACCOUNTS)
        await bench.start()
        gid = bench.gid()
        breaking.at(b"XA PREPARE", reaches=reaches)
        with pytest.raises(Unavailable, match="the connection was lost while the branch was prepared"):
            await bench.prepare(gid)
        assert breaking.broke
        # Whichever it was: repeated, the vote is the truth, and the work is done once.
        assert isinstance(await bench.prepare(gid), Prepared)
        breaking.at(b"XA COMMIT", reaches=reaches)
        assert await insisted(bench.commit, gid) == acked(gid)
        assert breaking.broke
        assert await bench.balance("ann") == 90
        assert await bench.rows() == {(gid, "b"): "committed"}
        other = bench.gid()
        assert isinstance(await bench.prepare(other), Prepared)
        breaking.at(b"XA ROLLBACK", reaches=reaches)
        assert await insisted(bench.abort, other) == acked(other)
        assert breaking.broke
        assert await bench.balance("ann") == 90
        await emptied(bench)


async def test_an_orphan_under_our_prefix_is_swept_up_and_a_foreign_one_is_not(bench, caplog):
    stranger = await bench.connect()
    await stranger.run("XA START 'theirs'", "UPDATE account SET balance = 7 WHERE name = 'cy'", "XA END 'theirs'")
    await stranger.run("XA PREPARE 'theirs'")

    async def outcome(request):
        if request.match_info["gid"].endswith("-77"):
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
    kept = {"'theirs'", "'shop-1-77"}

    async def held():
        return {row[3].partition("_")[0] for row in await bench.sql("XA RECOVER FORMAT='SQL'")}

    async def swept():
        return await held() == kept and await bench.rows() == {("shop-1-50", "b"): "aborted"}

    try:
        await bench.enlist("shop-1-50", "b", "ann", 1)
        await bench.enlist("shop-1-77", "b", "bob", 1)
        await eventually(swept, "the orphan is rolled back")
        await eventually(lambda: "has forgotten it" in caplog.text, "410 is an alarm, never a decision")
        assert await held() == kept
    finally:
        await served.stop()
        await runner.cleanup()
    await stranger.run("XA ROLLBACK 'theirs'")
    await stranger.close()


async def test_the_marker_of_a_late_branch_meets_the_tombstone(bench):
    gid = bench.gid()
    late = await bench.connect()
    xid = xid_of(gid, "b", database=bench.database, connection=late.id).sql
    await late.run(f"XA START {xid}", "UPDATE account SET balance = 1 WHERE name = 'ann'")
    assert await bench.abort(gid) == acked(gid)
    assert await late.error(marker_statement(gid, "b", database=bench.database, connection=late.id)) == 1062
    await late.close()


async def test_below_the_floor_there_is_no_marker(bench):
    old, new = bench.gid(), bench.gid()
    await bench.prepare(new, floor=new)
    await bench.manager.tidy()
    late = await bench.connect()
    xid = xid_of(old, "b", database=bench.database, connection=late.id).sql
    await late.run(f"XA START {xid}")
    assert await late.error(marker_statement(old, "b", database=bench.database, connection=late.id)) in (1048, 4025)
    await late.close()


async def test_the_manual_s_queries_show_what_they_should(bench):
    text = (Path(__file__).parents[2] / "docs" / "MARIADB.md").read_text()
    blocks = re.findall(r"^```sql\n(.*?)^```$", text.partition("## What to watch")[2], re.MULTILINE | re.DOTALL)
    listed, nobody_s, waiting, rows = [each for block in blocks for each in block.split(";\n") if each.strip()]
    gid, orphan = bench.gid(), bench.gid()
    await bench.enlist(orphan, "b", "bob", 1)
    await bench.prepare(gid)
    late = asyncio.create_task(bench.prepare(bench.gid()))

    async def waits():
        await asyncio.sleep(0.12)
        return await bench.sql(waiting)

    assert (await eventually(waits, "the late one waits"))[0][1] in await owners(bench)
    assert {row[3].split("_")[0] for row in await bench.sql(listed)} == {f"'{gid}", f"'{orphan}"}
    assert len(await bench.sql(nobody_s)) >= 1
    await bench.commit(gid)
    await late
    assert [row[1:3] for row in await bench.sql(rows)] == [("committed", 1)]


async def owners(bench):
    """Of all that is prepared."""
    return [int(row[3].split("'")[1].rpartition("_")[2]) for row in await bench.sql("XA RECOVER FORMAT='SQL'")]


async def test_an_application_that_stops_after_its_marker_does_not_keep_a_new_leader_waiting(mariadb, mariadb_database):
    """It is REPEATABLE READ, as MariaDB has it unless told otherwise, so its marker locks the horizon that it read."""
    bench = await stocked(mariadb, mariadb_database, lock_within_s=1.0)
    await bench.prepare(first := bench.gid(), op="pay", account="cy", amount=1)
    stopped = await bench.connect()
    gid = bench.gid()
    xid = xid_of(gid, "b", database=bench.database, connection=stopped.id).sql
    await stopped.run(f"XA START {xid}", "UPDATE account SET balance = 1 WHERE name = 'ann'")
    await stopped.run(marker_statement(gid, "b", database=bench.database, connection=stopped.id))
    assert await bench.commit(first, epoch=2) == acked(first)
    assert await bench.abort(gid, epoch=2) == acked(gid)
    assert await bench.balance("ann") == 100
    stopped.raw.close()
    await emptied(bench)


# ------------------------------------------------------------------------------------------- what is unfit


async def complaint(bench):
    with pytest.raises(Unfit) as caught:
        await bench.start()
    await bench.stop()
    return str(caught.value)


async def test_unfit_settings_are_named_with_what_helps():
    server = new_server(innodb_flush_log_at_trx_commit=2, log_bin="bin", max_connections=90)
    try:
        await server.start()
        await server.create_database("d")
        bench = MariaDbBench(server, "d")
        bench.other = await bench.connect()
        text = await complaint(bench)
        assert "SET GLOBAL innodb_flush_log_at_trx_commit = 1" in text
        assert "SET GLOBAL sync_binlog = 1" in text
        await bench.sql("SET GLOBAL innodb_flush_log_at_trx_commit = 1", "SET GLOBAL sync_binlog = 1")
        assert "SET GLOBAL max_connections" in await complaint(bench)
        await bench.sql("SET GLOBAL max_connections = 300", "SET GLOBAL binlog_format = STATEMENT")
        assert "SET GLOBAL binlog_format = ROW" in await complaint(bench)
        await bench.sql("SET GLOBAL binlog_format = MIXED", "SET GLOBAL read_only = 1")
        assert "only reads" in await complaint(bench)
        await bench.sql("SET GLOBAL read_only = 0")
        await bench.sql("CREATE USER shop@localhost", "GRANT SELECT, INSERT, UPDATE, DELETE ON d.* TO shop@localhost")
        bench.user = "shop"
        assert "GRANT PROCESS ON *.* TO 'shop'@'localhost'" in await complaint(bench)
        await bench.sql("GRANT PROCESS ON *.* TO shop@localhost")
        assert "CREATE TABLE IF NOT EXISTS outlast_branches" in await complaint(bench)
        bench.user = "root"
        await bench.start()
        await bench.stop()
        bench.user = "shop"
        await bench.sql(*ACCOUNTS)
        await bench.start()
        # With the binary log on, too, and as a user with no more than that.
        gid = bench.gid()
        await bench.prepare(gid)
        bench.settings = MariaDbSettings(tables_every_s=0.01)
        await bench.restart()
        # Nothing is promised any more once the server may forget it; what was promised is kept.
        await bench.sql("SET GLOBAL innodb_flush_log_at_trx_commit = 2")
        refused = await noticed(bench, "unfit_server")
        assert await bench.commit(gid) == acked(gid)
        await bench.sql("SET GLOBAL innodb_flush_log_at_trx_commit = 1")
        assert isinstance(await bench.prepare(again := bench.gid(), op="pay", account="bob", amount=1), Prepared)
        assert await bench.abort(again) == acked(again)
        assert (await bench.rows())[refused, "b"] == "aborted"
        await bench.stop()
        await bench.other.close()
    finally:
        await server.kill()
        server.remove()


async def noticed(bench, what):
    """The gid of the first transaction that is refused for it; those before are aborted."""

    async def refused():
        answer = await bench.prepare(gid := bench.gid(), op="pay", account="bob", amount=1)
        if isinstance(answer, Refused):
            assert answer.reason.startswith(what)
            return gid
        assert isinstance(answer, Prepared)
        assert await bench.abort(gid) == acked(gid)
        return None

    return await eventually(refused, what)


async def test_tables_that_do_not_roll_back_are_unfit(mariadb, mariadb_database):
    bench = MariaDbBench(mariadb, mariadb_database, tables_every_s=0.01)
    bench.other = await bench.connect()
    await bench.sql(*ACCOUNTS, "CREATE TABLE log(i int) ENGINE=MyISAM")
    assert "ALTER TABLE `log` ENGINE = InnoDB" in await complaint(bench)
    bench.left_alone = ("log",)
    await bench.start()
    assert isinstance(await bench.prepare(bench.gid()), Prepared)
    # And one that is made later is found by and by.
    await bench.sql("CREATE TABLE late(i int) ENGINE=Aria")
    await noticed(bench, "unfit_tables")
    await bench.sql("ALTER TABLE late ENGINE = InnoDB")
    assert isinstance(await bench.prepare(bench.gid(), op="pay", account="bob", amount=1), Prepared)
    await emptied(bench)


@pytest.mark.parametrize(
    "dsn",
    [
        *("postgresql://localhost/d", "mariadb://localhost", "mariadb://localhost/a/b", "mariadb://localhost:x/d"),
        *("mariadb://localhost/d?charset=latin1", "nonsense"),
    ],
)
def test_a_dsn_that_is_none(dsn):
    with pytest.raises(Unfit, match="mariadb://user"):
        MariaDbManager(dsn, operations)


async def test_who_is_not_let_in_is_told_so_and_a_server_that_is_down_is_another_thing(mariadb, mariadb_database):
    socket = f"?socket={mariadb.socket}"
    for dsn in (f"mariadb://nobody:wrong@localhost/d{socket}", mariadb.dsn("no_such_database")):
        manager = MariaDbManager(dsn, operations)
        with pytest.raises(Unfit, match="takes no connection") as caught:
            await manager.open()
        assert "wrong" not in str(caught.value)
        await manager.close()
    manager = MariaDbManager(f"mariadb://root@localhost/d?socket={mariadb.folder}/none", operations)
    with pytest.raises(Unavailable):
        await manager.open()
    await manager.close()
