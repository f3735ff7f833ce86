"""What MariaDB itself does with XA transactions: on this the adapter relies, or against this it guards.

No line of ours is at work here but the tests' own. A version that behaves in another way fails here first, with the
name of what has changed.
"""

import asyncio

import asyncmy
import pytest

from tests.integration.world import eventually
from tests.support.mariadb import Connection, connect, innodb_shows, new_server

pytest_plugins = ["tests.support.mariadb_fixtures"]

RESET_CONNECTION = 0x1F


class Ground:
    """A database with a table of three rows, and connections with it."""

    def __init__(self, server, database):
        self.server, self.database = server, database
        self.opened = []

    async def connect(self):
        connection = await connect(self.server, self.database)
        await connection.run("SET innodb_lock_wait_timeout = 1, lock_wait_timeout = 1")
        self.opened.append(connection)
        return connection

    async def prepared(self, name, *statements):
        """A connection that has prepared `name`."""
        owner = await self.connect()
        await owner.run(f"XA START '{name}'", *statements, f"XA END '{name}'", f"XA PREPARE '{name}'")
        return owner

    async def listed(self):
        return [row[3].decode() for row in await self.other.run("XA RECOVER")]

    async def values(self):
        return dict(await self.other.run("SELECT id, v FROM t"))

    async def server_restarts(self):
        for connection in self.opened:
            connection.raw.close()
        await self.server.kill()
        await self.server.start()
        self.opened.clear()
        self.other = await self.connect()

    async def let_go(self, connection):
        """Close it, and wait until InnoDB shows no transaction of it any more."""
        await connection.close()
        await self.nobody_s(connection)

    async def nobody_s(self, connection):
        async def gone():
            return not await innodb_shows(self.other, f"trx_mysql_thread_id = {connection.id}")

        await eventually(gone, "the owner has let go")


SET_UP = (
    "CREATE TABLE t(id int PRIMARY KEY, v int NOT NULL) ENGINE=InnoDB",
    "INSERT INTO t VALUES (1, 1), (2, 2), (3, 3)",
)
CHANGE = "UPDATE t SET v = 10 WHERE id = 1"


@pytest.fixture
async def ground(mariadb, mariadb_database):
    ground = Ground(mariadb, mariadb_database)
    ground.other = await ground.connect()
    await ground.other.run(*SET_UP)
    yield ground
    left = await ground.listed()
    for connection in ground.opened:
        await connection.close()
    if left:
        await mariadb.kill()
        await mariadb.start()
        clean = await ground.connect()
        for name in left:
            await clean.run(f"XA ROLLBACK '{name}'")
        await clean.close()
    assert left == [], "the test leaves nothing prepared"


# ------------------------------------------------------------------------------------------- whose a branch is


async def test_a_prepared_branch_is_its_connection_s_for_as_long_as_that_is_open(ground):
    owner = await ground.prepared("g", CHANGE)
    assert await ground.listed() == ["g"]
    assert await ground.other.error("XA COMMIT 'g'") == 1397, "and it is listed all the same"
    await ground.let_go(owner)
    await ground.other.run("XA COMMIT 'g'")
    assert await ground.other.error("XA COMMIT 'g'") == 1397, "the same number when it is over"
    assert (await ground.values())[1] == 10


async def test_killing_the_owner_sets_the_branch_free_and_twice_is_an_error_of_its_own(ground):
    owner = await ground.prepared("g", CHANGE)
    await ground.other.run(f"KILL {owner.id}")

    async def gone():
        return not await ground.other.run(f"SELECT 1 FROM information_schema.processlist WHERE id = {owner.id}")

    await eventually(gone, "the owner is gone")
    assert await ground.other.error(f"KILL {owner.id}") == 1094
    await ground.let_go(owner)
    await ground.other.run("XA ROLLBACK 'g'")
    assert (await ground.values())[1] == 1


async def test_the_owner_of_a_prepared_branch_can_do_nothing_but_finish_it(ground):
    owner = await ground.prepared("g", CHANGE)
    for statement in ("XA START 'h'", "BEGIN", "INSERT INTO t VALUES (9, 9)", "COMMIT", "SELECT v FROM t"):
        assert await owner.error(statement) == 1399
    await owner.run("XA COMMIT 'g'")
    await owner.run("XA START 'h'", "XA END 'h'", "XA ROLLBACK 'h'")


async def test_resetting_the_owner_s_connection_makes_a_commit_that_does_nothing(ground):
    owner = await ground.prepared("g", CHANGE)
    await owner.raw._execute_command(RESET_CONNECTION, b"")
    await owner.raw._read_ok_packet()
    assert await ground.listed() == ["g"]
    await ground.other.run("XA COMMIT 'g'")
    assert (await ground.values())[1] == 1, "it was acknowledged, and nothing is committed"
    assert await ground.listed() == []
    assert await ground.other.error(CHANGE) == 1205, "its locks are held, under no name"
    # Only a new start brings the name back.
    await ground.server_restarts()
    assert await ground.listed() == ["g"]
    await ground.other.run("XA COMMIT 'g'")
    assert (await ground.values())[1] == 10


async def test_innodb_shows_whose_a_transaction_is_and_when_nobody_s(ground):
    owner = await ground.prepared("g", CHANGE)
    await eventually(lambda: innodb_shows(ground.other, f"trx_mysql_thread_id = {owner.id}"), "it is the owner's")
    await ground.let_go(owner)
    assert (0,) in await ground.other.run("SELECT trx_mysql_thread_id FROM information_schema.innodb_trx")
    await ground.other.run("XA ROLLBACK 'g'")


async def test_branches_survive_kill_9_with_their_locks(ground):
    many = 20
    for number in range(many):
        await ground.prepared(f"g{number}", f"INSERT INTO t VALUES ({100 + number}, 0)")
    await ground.server_restarts()
    assert len(await ground.listed()) == many
    assert await ground.other.error("INSERT INTO t VALUES (100, 1)") == 1205
    for number in range(many):
        await ground.other.run(f"XA {'COMMIT' if number % 2 else 'ROLLBACK'} 'g{number}'")
    assert len(await ground.values()) == 3 + many // 2


async def test_with_a_lazy_log_a_prepared_branch_is_lost():
    server = new_server(innodb_flush_log_at_trx_commit=0, innodb_flush_log_at_timeout=2700)
    try:
        await server.start()
        await server.create_database("d")
        connection = await connect(server, "d")
        await connection.run("CREATE TABLE t(id int PRIMARY KEY) ENGINE=InnoDB", "FLUSH ENGINE LOGS")
        await connection.run("XA START 'g'", "INSERT INTO t VALUES (1)", "XA END 'g'", "XA PREPARE 'g'")
        assert len(await connection.run("XA RECOVER")) == 1
        connection.raw.close()
        await server.kill()
        await server.start()
        after = await connect(server, "d")
        assert await after.run("XA RECOVER") == []
        await after.close()
    finally:
        await server.stop()
        server.remove()


# ------------------------------------------------------------------------------------------- errors in the work


@pytest.mark.parametrize(
    ("number", "statement"),
    [
        (1062, "INSERT INTO t VALUES (3, 9)"),
        (1205, "UPDATE t SET v = 9 WHERE id = 3"),
        (1048, "INSERT INTO t VALUES (9, NULL)"),
    ],
)
async def test_after_an_error_the_rest_of_the_work_can_be_prepared(ground, number, statement):
    holder = await ground.connect()
    await holder.run("BEGIN", "SELECT * FROM t WHERE id = 3 FOR UPDATE" if number == 1205 else "SELECT 1")
    worker = await ground.connect()
    await worker.run("XA START 'g'", CHANGE)
    assert await worker.error(statement) == number
    await worker.run("XA END 'g'", "XA PREPARE 'g'", "XA COMMIT 'g'")
    assert (await ground.values())[1] == 10, "part of the work is committed"


async def test_a_deadlock_leaves_nothing_to_be_prepared(ground):
    one, other = await ground.connect(), await ground.connect()
    await other.run("BEGIN", "UPDATE t SET v = v + 1 WHERE id IN (2, 3)", "UPDATE t SET v = v + 1 WHERE id IN (2, 3)")
    await one.run("XA START 'g'", CHANGE)
    waiting = asyncio.create_task(other.run(CHANGE))
    held_up = f"trx_state = 'LOCK WAIT' AND trx_mysql_thread_id = {other.id}"
    await eventually(lambda: innodb_shows(ground.other, held_up), "the other waits")
    assert await one.error("UPDATE t SET v = 9 WHERE id = 2") == 1213
    assert await one.error("XA END 'g'") == 1399
    assert await one.error("XA PREPARE 'g'") == 1399
    await one.run("XA ROLLBACK 'g'")
    await waiting
    await other.run("ROLLBACK")


async def test_the_same_name_twice(ground):
    one, other = await ground.connect(), await ground.connect()
    await one.run("XA START 'g','b',1")
    assert await other.error("XA START 'g','b',1") == 1440
    assert await other.error("XA START 'g','b',2") == 1440, "the format id does not tell two apart"
    await other.run("XA START 'g','c'", "XA END 'g','c'", "XA ROLLBACK 'g','c'")
    await one.run("XA END 'g','b'", "XA ROLLBACK 'g','b'")


async def test_statements_in_the_wrong_state(ground):
    one = await ground.connect()
    for statement in ("XA END 'g'", "XA PREPARE 'g'"):
        assert await one.error(statement) == 1399
    for statement in ("XA COMMIT 'g'", "XA ROLLBACK 'g'"):
        assert await one.error(statement) == 1397
    await one.run("XA START 'g'", CHANGE)
    for statement in ("COMMIT", "BEGIN", "ROLLBACK", "CREATE TABLE u(i int)", "XA PREPARE 'g'", "XA START 'h'"):
        assert await one.error(statement) == 1399
    await one.run("XA END 'g'")
    assert await one.error("UPDATE t SET v = 9 WHERE id = 2") == 1399
    await one.run("XA ROLLBACK 'g'")


async def test_anybody_may_end_anybody_s_branch(ground):
    """There is no permission check, of which the manual warns."""
    await ground.other.run("CREATE OR REPLACE USER nobody_s@localhost")
    await ground.let_go(await ground.prepared("g", CHANGE))
    raw = await asyncmy.connect(unix_socket=str(ground.server.socket), user="nobody_s", autocommit=True)
    stranger = Connection(raw)
    await stranger.run("XA COMMIT 'g'")
    await stranger.close()
    assert await ground.listed() == []
    assert (await ground.values())[1] == 10


async def test_names_have_64_bytes_in_each_part(ground):
    one = await ground.connect()
    longest = f"'{'g' * 64}','{'b' * 64}'"
    await one.run(f"XA START {longest}", CHANGE, f"XA END {longest}", f"XA PREPARE {longest}")
    ((_, gtrid_bytes, bqual_bytes, data),) = await ground.other.run("XA RECOVER")
    assert (gtrid_bytes, bqual_bytes, data) == (64, 64, b"g" * 64 + b"b" * 64)
    await one.run(f"XA ROLLBACK {longest}")
    for name in (f"'{'g' * 65}'", f"'g','{'b' * 65}'"):
        assert await one.error(f"XA START {name}") == 1064


async def test_the_list_can_be_pasted_into_a_commit(ground):
    one = await ground.connect()
    name = "X'676964','br-1'"
    await one.run(f"XA START {name}", CHANGE, f"XA END {name}", f"XA PREPARE {name}")
    ((_, _, _, shown),) = await ground.other.run("XA RECOVER FORMAT='SQL'")
    await ground.let_go(one)
    await ground.other.run(f"XA COMMIT {shown}")
    assert (await ground.values())[1] == 10


# ------------------------------------------------------------------------------------------- what is not prepared


@pytest.mark.parametrize("query", ["SELECT * FROM t", "SELECT * FROM t WHERE id = 1 FOR UPDATE"])
async def test_a_branch_that_changed_nothing_is_rolled_back_when_its_connection_ends(ground, query):
    owner = await ground.prepared("g", query)
    await owner.close()

    async def left():
        return await ground.other.error("XA COMMIT 'g'") == 1402

    await eventually(left, "nobody owns it")
    assert await ground.listed() == []


async def test_the_session_counts_the_rows_that_it_writes_and_nothing_else(ground):
    """By these counters the adapter knows that a branch of plain queries has written nothing."""
    one = await ground.connect()
    await ground.other.run("CREATE FUNCTION f() RETURNS int MODIFIES SQL DATA BEGIN UPDATE t SET v = 7; RETURN 1; END")

    async def written():
        return (
            await one.run(
                "SELECT SUM(variable_value) FROM information_schema.session_status"
                " WHERE variable_name IN ('HANDLER_WRITE', 'HANDLER_UPDATE', 'HANDLER_DELETE')"
            )
        )[0][0]

    await one.run("XA START 'g'")
    before = await written()
    await one.run("SELECT t.id, u.id FROM t JOIN t AS u ON u.v < t.v GROUP BY t.v ORDER BY u.v DESC")
    assert await written() == before
    await one.run("SELECT f()")
    assert await written() > before
    await one.run("XA END 'g'", "XA ROLLBACK 'g'")


async def test_tables_of_other_engines_do_not_roll_back(ground):
    for engine in ("MyISAM", "Aria", "MEMORY"):
        await ground.other.run(f"CREATE TABLE x_{engine}(i int) ENGINE={engine}")
    one = await ground.connect()
    inserts = [f"INSERT INTO x_{engine} VALUES (1)" for engine in ("MyISAM", "Aria", "MEMORY")]
    await one.run("XA START 'g'", *inserts, CHANGE, "XA END 'g'", "XA PREPARE 'g'", "XA ROLLBACK 'g'")
    for engine in ("MyISAM", "Aria", "MEMORY"):
        assert await ground.other.run(f"SELECT i FROM x_{engine}") == [(1,)]


# ------------------------------------------------------------------------------------------- late prepares


async def waiting_prepare(ground, name):
    """A prepare that waits, because a backup keeps everybody from committing; and the backup's connection."""
    worker, backup = await ground.connect(), await ground.connect()
    await worker.run(f"XA START '{name}'", CHANGE, f"XA END '{name}'")
    await worker.run("SET lock_wait_timeout = 60")
    await backup.run("FLUSH TABLES WITH READ LOCK")
    task = asyncio.create_task(worker.run(f"XA PREPARE '{name}'"))

    async def waits():
        rows = await ground.other.run(f"SELECT info FROM information_schema.processlist WHERE id = {worker.id}")
        return rows == [(f"XA PREPARE '{name}'",)]

    await eventually(waits, "the prepare waits, and its name can be seen")
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    worker.raw.close()
    return worker, backup


async def test_a_prepare_outlives_its_client(ground):
    worker, backup = await waiting_prepare(ground, "g")
    assert await ground.other.error("XA ROLLBACK 'g'") == 1397, "unknown, and yet it will be prepared"
    assert await ground.listed() == []
    await backup.run("UNLOCK TABLES")

    async def there():
        return await ground.listed() == ["g"]

    await eventually(there, "the orphan appears")
    await ground.nobody_s(worker)
    await ground.other.run("XA ROLLBACK 'g'")


async def test_killing_its_connection_stops_a_waiting_prepare(ground):
    worker, backup = await waiting_prepare(ground, "g")
    await ground.other.run(f"KILL {worker.id}")

    async def gone():
        return not await ground.other.run(f"SELECT 1 FROM information_schema.processlist WHERE id = {worker.id}")

    await eventually(gone, "it is gone")
    await backup.run("UNLOCK TABLES")
    assert await ground.listed() == []
    await ground.other.run("UPDATE t SET v = 11 WHERE id = 1")
