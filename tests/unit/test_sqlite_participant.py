"""SQLite as a resource manager: every trap of prepared work in a database that has no prepared transactions."""

import asyncio
import itertools
import json
import logging
import sys
import time

import apsw
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.protocol.messages import (
    Abort,
    Acked,
    Commit,
    Contradicted,
    Prepare,
    Prepared,
    ReadOnly,
    Refused,
    StaleEpoch,
    Stamp,
)
from participants.manager import Envelope, Unavailable
from participants.operations import Operations, Refuse
from participants.sqlite import AlreadyOpen, SchemaUnfit, SqliteBranch, SqliteManager, SqliteSettings
from participants.sqlite_locks import _EXCLUDES, Mode
from participants.sqlite_tables import Key, quoted

SCHEMA = """
CREATE TABLE IF NOT EXISTS account(name TEXT PRIMARY KEY NOT NULL, balance INTEGER NOT NULL, email TEXT UNIQUE);
CREATE TABLE IF NOT EXISTS entry(
  id TEXT PRIMARY KEY NOT NULL, account TEXT NOT NULL REFERENCES account(name) ON DELETE CASCADE
    DEFERRABLE INITIALLY DEFERRED
) WITHOUT ROWID;
INSERT INTO account VALUES ('ann', 100, 'ann@shop'), ('bob', 100, NULL), ('cy', 100, NULL) ON CONFLICT DO NOTHING;
"""

operations = Operations()


@operations.operation("sql")
def sql(branch: SqliteBranch, statements: list) -> list:
    """Tests may send SQL; nobody else should offer this."""
    rows: list = []
    for statement in statements:
        rows = [list(row) for row in branch.execute(statement)]
    return rows


@operations.operation("share")
def share(branch: SqliteBranch, account: str, statements: list) -> None:
    branch.lock_shared("account", account)
    for statement in statements:
        branch.execute(statement)


@operations.operation("fail")
def fail(branch: SqliteBranch, how: str) -> object:
    branch.execute("UPDATE account SET balance = 0 WHERE name = 'ann'")
    match how:
        case "refuse":
            raise Refuse("not today", retryable=True)
        case "raise":
            raise KeyError("secret detail")
        case "exit":
            sys.exit(3)
        case "unserializable":
            return object()
        case "large":
            return "x" * 40_000
    raise AssertionError(how)


class Bench:
    """A manager on one file, and messages in short."""

    def __init__(self, folder, *, schema=SCHEMA, ops=operations, **settings):
        self.path, self.schema, self.ops = folder / "shop.db", schema, ops
        self.settings = SqliteSettings(**settings)
        self.vfs = None
        self.last = 0

    async def start(self):
        self.manager = SqliteManager(
            self.path, self.ops, schema=self.schema, settings=self.settings, now=lambda: 1000.0, vfs=self.vfs
        )
        found = await self.manager.open()
        self.other = apsw.Connection(str(self.path))
        return found

    async def stop(self):
        self.other.close()
        await self.manager.close()

    async def restart(self):
        await self.stop()
        return await self.start()

    def gid(self):
        self.last += 1
        return f"shop-1-{self.last}"

    def prepare_of(self, *statements, gid=None, epoch=1, floor=None, **payload):
        body = payload or {"op": "sql", "statements": list(statements)}
        message = Prepare(gid=gid or self.gid(), branch="b", payload=json.dumps(body).encode())
        return Envelope(message, Stamp(epoch=epoch, floor=floor))

    async def handle(self, *envelopes):
        return await self.manager.handle(envelopes)

    async def prepare(self, *statements, **more):
        (answer,) = await self.handle(self.prepare_of(*statements, **more))
        return answer

    async def decide(self, kind, gid, *, epoch=1, floor=None):
        (answer,) = await self.handle(Envelope(kind(gid=gid, branch="b"), Stamp(epoch=epoch, floor=floor)))
        return answer

    async def commit(self, gid, **stamp):
        return await self.decide(Commit, gid, **stamp)

    async def abort(self, gid, **stamp):
        return await self.decide(Abort, gid, **stamp)

    async def done(self, *statements):
        vote = await self.prepare(*statements)
        assert isinstance(vote, Prepared), vote
        assert isinstance(await self.commit(vote.gid), Acked)

    def rows(self, query):
        return self.other.execute(query).fetchall()

    def balance(self, name):
        return self.other.execute("SELECT balance FROM account WHERE name = ?", (name,)).get


@pytest.fixture
async def bench(tmp_path):
    it = Bench(tmp_path)
    await it.start()
    yield it
    await it.stop()


def locked(answer, table="account"):
    return isinstance(answer, Refused) and answer.reason == f"locked: {table}" and answer.retryable


SPEND = "UPDATE account SET balance = balance - 10 WHERE name = 'ann'"

# ------------------------------------------------------------------------------------------------ the protocol


async def test_prepared_work_is_invisible_until_the_commit_and_gone_after_an_abort(bench):
    vote = await bench.prepare(SPEND, "SELECT balance FROM account WHERE name = 'ann'")
    assert isinstance(vote, Prepared)
    assert json.loads(vote.result) == [[90]]
    assert bench.balance("ann") == 100
    assert [each.gid for each in await bench.manager.in_doubt()] == [vote.gid]
    assert isinstance(await bench.commit(vote.gid), Acked)
    assert bench.balance("ann") == 90
    assert await bench.manager.in_doubt() == []

    vote = await bench.prepare(SPEND)
    assert isinstance(await bench.abort(vote.gid), Acked)
    assert bench.balance("ann") == 90
    assert bench.rows("SELECT * FROM outlast_lock") == []


async def test_every_message_may_come_twice(bench):
    request = bench.prepare_of(SPEND)
    gid = request.message.gid
    first, *_ = await bench.handle(request)
    again, *_ = await bench.handle(request)
    assert first == again
    assert await bench.commit(gid) == await bench.commit(gid) == Acked(gid=gid, branch="b")
    assert bench.balance("ann") == 90
    assert await bench.abort(gid) == Contradicted(gid=gid, branch="b", state="committed")
    late, *_ = await bench.handle(request)
    assert late == first
    assert bench.balance("ann") == 90


async def test_an_abort_before_the_prepare_leaves_a_tombstone(bench):
    request = bench.prepare_of(SPEND)
    assert isinstance(await bench.abort(request.message.gid), Acked)
    assert (await bench.handle(request))[0].reason == "aborted"
    assert isinstance(await bench.commit(request.message.gid), Contradicted)


async def test_a_commit_of_what_never_prepared_is_no_ack(bench):
    assert await bench.commit("shop-1-9") == Contradicted(gid="shop-1-9", branch="b", state="unknown")


async def test_work_without_changes_votes_read_only_and_does_not_run_again(bench):
    request = bench.prepare_of("UPDATE account SET balance = balance", "SELECT count(*) FROM account")
    first, *_ = await bench.handle(request)
    assert isinstance(first, ReadOnly)
    await bench.done("INSERT INTO account VALUES ('dee', 1, NULL)")
    again, *_ = await bench.handle(request)
    assert again == first, "it would count one more now"
    assert bench.rows("SELECT * FROM outlast_lock") == []


async def test_a_refusal_is_kept_too(bench):
    refused = await bench.prepare(op="fail", how="refuse", gid="shop-1-50")
    assert refused == Refused(gid="shop-1-50", branch="b", reason="not today", retryable=True)
    assert await bench.prepare(SPEND, gid="shop-1-50") == refused


async def test_a_batch_holds_all_kinds_and_answers_in_order(bench):
    old = await bench.prepare(SPEND)
    answers = await bench.handle(
        bench.prepare_of("UPDATE account SET balance = 1 WHERE name = 'bob'"),
        bench.prepare_of(SPEND),
        Envelope(Commit(gid=old.gid, branch="b"), Stamp(epoch=1)),
        bench.prepare_of(SPEND),
        Envelope(Abort(gid="shop-1-99", branch="b"), Stamp(epoch=1)),
        Envelope(Commit(gid="shop-1-98", branch="b"), Stamp(epoch=1)),
    )
    # The commit goes first, so only the second of the two that touch the same row is refused.
    assert [type(answer) for answer in answers] == [Prepared, Prepared, Acked, Refused, Acked, Contradicted]
    assert locked(answers[3])
    assert bench.balance("ann") == 90


# ------------------------------------------------------------------------------------------------ restarts


async def test_prepared_branches_and_their_locks_survive_a_restart(bench):
    vote = await bench.prepare(SPEND)
    (found,) = await bench.restart()
    assert (found.gid, found.branch, found.prepared_at) == (vote.gid, "b", 1000.0)
    assert locked(await bench.prepare(SPEND))
    assert isinstance(await bench.commit(vote.gid), Acked)
    assert bench.balance("ann") == 90


async def test_the_epoch_survives_a_restart(bench):
    await bench.prepare(SPEND, epoch=7)
    await bench.restart()
    assert isinstance(answer := await bench.prepare(SPEND, epoch=6), StaleEpoch)
    assert answer.epoch == 7


async def test_records_are_pruned_below_the_floor_only_and_the_floor_survives(bench):
    ended = [await bench.prepare(f"INSERT INTO account VALUES ('n{i}', 1, NULL)") for i in range(4)]
    await bench.commit(ended[0].gid)
    await bench.abort(ended[1].gid)
    await bench.commit(ended[3].gid)
    kept = "SELECT number & 255, state FROM outlast_branch ORDER BY number"
    assert bench.rows(kept) == [(1, "committed"), (2, "aborted"), (3, "prepared"), (4, "committed")]
    await bench.commit(ended[3].gid, floor=ended[3].gid)
    assert bench.rows(kept) == [(3, "prepared"), (4, "committed")]

    await bench.restart()
    for gone in ended[:2]:
        late = await bench.prepare("UPDATE account SET balance = 7", gid=gone.gid)
        assert late == Refused(gid=gone.gid, branch="b", reason="ended")
        assert isinstance(await bench.commit(gone.gid), Acked)
        assert isinstance(await bench.abort(gone.gid), Acked)
    assert isinstance(await bench.commit(ended[2].gid), Acked), "below the floor, and still prepared"
    assert bench.rows(kept)[-1] == (4, "committed")


async def test_pruning_goes_on_in_bounded_pieces(tmp_path):
    bench = Bench(tmp_path, pruned_per_batch=1)
    await bench.start()
    await bench.handle(*(Envelope(Abort(gid=bench.gid(), branch="b"), Stamp(epoch=1)) for _ in range(10)))
    left = []
    for _ in range(4):
        await bench.abort("shop-1-99", floor="shop-1-99")
        left.append(bench.other.execute("SELECT count(*) FROM outlast_branch WHERE number & 255 < 99").get)
    assert left == [7, 4, 1, 0]
    await bench.stop()


async def test_two_managers_never_share_a_database(bench):
    second = SqliteManager(bench.path, operations)
    with pytest.raises(AlreadyOpen, match=r"shop\.db is in use"):
        await second.open()
    await second.close()
    assert isinstance(await bench.prepare(SPEND), Prepared)


async def test_a_link_to_the_database_is_the_same_database(bench, tmp_path):
    (tmp_path / "alias.db").symlink_to(bench.path)
    second = SqliteManager(tmp_path / "alias.db", operations)
    with pytest.raises(AlreadyOpen):
        await second.open()
    await second.close()


# ------------------------------------------------------------------------------------------------ keys and locks


@pytest.mark.parametrize(
    ("table", "why"),
    [
        ("CREATE TABLE log(line)", "table log has no explicit primary key"),
        ("CREATE TABLE log(line TEXT PRIMARY KEY)", "table log allows NULL in its primary key"),
        ("CREATE TABLE log(id INTEGER PRIMARY KEY DESC, x)", "table log allows NULL in its primary key"),
        ("CREATE TABLE log(id INTEGER PRIMARY KEY, x, y AS (x + 1))", "table log has a generated column"),
        (
            "CREATE TABLE log(id INTEGER PRIMARY KEY, x); CREATE UNIQUE INDEX up ON log(upper(x))",
            "has the unique index up on an expression",
        ),
        ("CREATE TABLE log(id INTEGER PRIMARY KEY, x REFERENCES gone)", "references gone, which is missing"),
        ("CREATE TABLE log(id INTEGER PRIMARY KEY, x REFERENCES account)", "references account.name from x, which has"),
        ("CREATE VIRTUAL TABLE log USING fts5(line)", "table log is a virtual table"),
    ],
)
async def test_tables_that_cannot_be_changed_safely_are_refused_at_the_start(tmp_path, table, why):
    bench = Bench(tmp_path, schema=SCHEMA + table)
    with pytest.raises(SchemaUnfit, match=why):
        await bench.start()
    await bench.manager.close()


async def test_unfit_tables_may_be_left_alone_but_not_changed(tmp_path):
    bench = Bench(tmp_path, schema=SCHEMA + "CREATE TABLE IF NOT EXISTS Log(line)", left_alone=frozenset(["log"]))
    await bench.start()
    refused = await bench.prepare(SPEND, "INSERT INTO log VALUES ('spent')")
    assert refused.reason.startswith("not_allowed: table Log has no explicit primary key")
    await bench.stop()


async def test_tables_that_appear_later_are_guarded_or_refused(bench):
    bench.other.execute("CREATE TABLE log(line); CREATE TABLE later(id INTEGER PRIMARY KEY, x)")
    refused = await bench.prepare("INSERT INTO log VALUES ('spent')")
    assert refused.reason.startswith("not_allowed: table log has no explicit primary key")
    vote = await bench.prepare("INSERT INTO later VALUES (1, 2)")
    with pytest.raises(apsw.ConstraintError, match="locked by a prepared transaction: later"):
        bench.other.execute("INSERT INTO later VALUES (1, 3)")
    await bench.commit(vote.gid)
    assert bench.rows("SELECT * FROM later") == [(1, 2)]


async def test_a_locked_row_refuses_at_once_and_is_free_after_the_decision(bench):
    first = await bench.prepare(SPEND)
    assert locked(await bench.prepare(SPEND))
    assert locked(await bench.prepare("DELETE FROM account WHERE name = 'ann'"))
    assert isinstance(await bench.prepare("UPDATE account SET balance = 5 WHERE name = 'bob'"), Prepared)
    await bench.abort(first.gid)
    assert isinstance(await bench.prepare(SPEND), Prepared)


async def test_two_branches_cannot_insert_the_same_key(bench):
    insert = "INSERT INTO account VALUES ('dee', 1, NULL)"
    first = await bench.prepare(insert)
    assert locked(await bench.prepare(insert))
    await bench.commit(first.gid)
    refused = await bench.prepare(insert)
    assert refused.reason == "constraint: UNIQUE constraint failed: account.name"
    assert not refused.retryable


async def test_old_and_new_values_of_unique_columns_are_locked(bench):
    await bench.prepare("UPDATE account SET email = 'new@shop' WHERE name = 'ann'")
    for email in ("ann@shop", "new@shop"):
        # Only the value collides: the rows are different ones.
        answer = await bench.prepare(f"UPDATE account SET email = '{email}' WHERE name = 'bob'")
        assert isinstance(answer, Refused), "the old value may come back, the new one may come"
    assert isinstance(await bench.prepare("UPDATE account SET email = 'x@shop' WHERE name = 'bob'"), Prepared)


async def test_a_unique_value_that_is_about_to_go_takes_no_children(tmp_path):
    more = "CREATE TABLE IF NOT EXISTS letter(id INTEGER PRIMARY KEY, email TEXT NOT NULL REFERENCES account(email));"
    bench = Bench(tmp_path, schema=SCHEMA + more)
    await bench.start()
    await bench.prepare("UPDATE account SET email = 'new@shop' WHERE name = 'ann'")
    assert locked(await bench.prepare("INSERT INTO letter VALUES (1, 'ann@shop')"))
    await bench.stop()


def test_the_modes_exclude_each_other_as_the_table_in_the_manual_says():
    excludes = {(held, wanted) for held in Mode for wanted in _EXCLUDES[held]}
    assert excludes == {(wanted, held) for held, wanted in excludes}
    compatible = {frozenset(pair) for pair in itertools.product(Mode, Mode) if pair not in excludes}
    assert compatible == {
        frozenset({Mode.KEY_SHARE}),
        frozenset({Mode.SHARE}),
        frozenset({Mode.KEY_SHARE, Mode.SHARE}),
        frozenset({Mode.KEY_SHARE, Mode.UPDATE}),
    }
    for weaker, stronger in itertools.pairwise(Mode):
        assert _EXCLUDES[weaker] <= _EXCLUDES[stronger], "the strongest wish of a branch stands for all"


async def test_nulls_do_not_collide(bench):
    assert isinstance(await bench.prepare("INSERT INTO account VALUES ('dee', 1, NULL)"), Prepared)
    assert isinstance(await bench.prepare("INSERT INTO account VALUES ('eve', 1, NULL)"), Prepared)


@pytest.mark.parametrize(
    ("column", "first", "second"),
    [
        ("TEXT COLLATE NOCASE", "'Ann'", "'aNN'"),
        ("TEXT COLLATE RTRIM", "'ann'", "'ann  '"),
        ("", "1", "1.0"),
        ("REAL", "1", "1.0"),
        ("", "x'00ff'", "X'00FF'"),
        ("TEXT", "'it''s'", "'it''s'"),
    ],
)
async def test_values_that_an_index_takes_for_equal_collide(tmp_path, column, first, second):
    bench = Bench(tmp_path, schema=f"CREATE TABLE IF NOT EXISTS t(id INTEGER PRIMARY KEY, u {column} UNIQUE)")
    await bench.start()
    assert isinstance(await bench.prepare(f"INSERT INTO t VALUES (1, {first})"), Prepared)
    assert locked(await bench.prepare(f"INSERT INTO t VALUES (2, {second})"), "t")
    with pytest.raises(apsw.ConstraintError, match="locked by"):
        bench.other.execute(f"INSERT INTO t VALUES (3, {second})")
    await bench.stop()


async def test_a_key_of_several_columns_is_locked_whole_when_one_of_them_changes(tmp_path):
    schema = "CREATE TABLE IF NOT EXISTS seat(id INTEGER PRIMARY KEY, row TEXT, place INTEGER, UNIQUE(row, place))"
    bench = Bench(tmp_path, schema=f"{schema}; INSERT INTO seat VALUES (1, 'A', 1), (2, 'A', 2) ON CONFLICT DO NOTHING")
    await bench.start()
    vote = await bench.prepare("UPDATE seat SET place = 9 WHERE id = 1")
    assert locked(await bench.prepare("INSERT INTO seat VALUES (3, 'A', 9)"), "seat")
    assert isinstance(await bench.prepare("INSERT INTO seat VALUES (3, 'B', 9)"), Prepared)
    await bench.commit(vote.gid)
    assert bench.rows("SELECT place FROM seat WHERE id = 1") == [(9,)]
    await bench.stop()


async def test_a_row_that_changes_its_primary_key_is_locked_under_both(bench):
    vote = await bench.prepare("UPDATE account SET name = 'anna' WHERE name = 'ann'")
    assert locked(await bench.prepare("INSERT INTO account VALUES ('anna', 1, NULL)"))
    assert locked(await bench.prepare(SPEND))
    await bench.commit(vote.gid)
    assert bench.balance("anna") == 100


async def test_keys_that_sqlite_assigns_collide_instead_of_overwriting(tmp_path):
    bench = Bench(tmp_path, schema="CREATE TABLE IF NOT EXISTS t(id INTEGER PRIMARY KEY AUTOINCREMENT, x)")
    await bench.start()
    first = await bench.prepare("INSERT INTO t(x) VALUES ('a')")
    assert locked(await bench.prepare("INSERT INTO t(x) VALUES ('b')"), "t")
    await bench.commit(first.gid)
    await bench.done("INSERT INTO t(x) VALUES ('b')")
    assert bench.rows("SELECT * FROM t") == [(1, "a"), (2, "b")]
    await bench.stop()


async def test_parents_of_new_rows_stay_but_may_change_otherwise(bench):
    child = await bench.prepare("INSERT INTO entry VALUES ('e1', 'ann')")
    assert locked(await bench.prepare("DELETE FROM account WHERE name = 'ann'"))
    assert locked(await bench.prepare("UPDATE account SET name = 'anna' WHERE name = 'ann'"))
    parent = await bench.prepare(SPEND)
    assert isinstance(parent, Prepared), "the balance has nothing to do with who refers to the account"
    assert isinstance(await bench.commit(child.gid), Acked)
    assert isinstance(await bench.commit(parent.gid), Acked)
    assert bench.balance("ann") == 90
    assert bench.rows("PRAGMA foreign_key_check") == []


async def test_a_parent_that_is_about_to_go_takes_no_children(bench):
    gone = await bench.prepare("DELETE FROM account WHERE name = 'ann'")
    assert locked(await bench.prepare("INSERT INTO entry VALUES ('e1', 'ann')"))
    await bench.commit(gone.gid)
    refused = await bench.prepare("INSERT INTO entry VALUES ('e1', 'ann')")
    assert refused.reason == "constraint: a foreign key has no parent"


async def test_deferred_foreign_keys_are_checked_before_the_vote(bench):
    refused = await bench.prepare("INSERT INTO entry VALUES ('e1', 'nobody')")
    assert refused == Refused(gid=refused.gid, branch="b", reason="constraint: a foreign key has no parent")
    both = ("INSERT INTO entry VALUES ('e1', 'dee')", "INSERT INTO account VALUES ('dee', 1, NULL)")
    assert isinstance(await bench.prepare(*both), Prepared), "the parent may come later in the same branch"


async def test_cascades_are_part_of_the_branch_and_happen_once(bench):
    await bench.done("INSERT INTO entry VALUES ('e1', 'ann'), ('e2', 'ann'), ('e3', 'bob')")
    gone = await bench.prepare("DELETE FROM account WHERE name = 'ann'")
    assert locked(await bench.prepare("DELETE FROM entry WHERE id = 'e2'"), "entry")
    assert isinstance(await bench.commit(gone.gid), Acked)
    assert bench.rows("SELECT id FROM entry") == [("e3",)]


async def test_triggers_run_once_while_the_branch_works(tmp_path):
    bench = Bench(
        tmp_path,
        schema="""
        CREATE TABLE IF NOT EXISTS t(id INTEGER PRIMARY KEY, x INTEGER);
        CREATE TABLE IF NOT EXISTS total(id INTEGER PRIMARY KEY, x INTEGER);
        INSERT INTO total VALUES (1, 0) ON CONFLICT DO NOTHING;
        CREATE TRIGGER IF NOT EXISTS adds AFTER INSERT ON t BEGIN UPDATE total SET x = x + NEW.x; END;
        """,
    )
    await bench.start()
    first = await bench.prepare("INSERT INTO t VALUES (1, 5)")
    assert locked(await bench.prepare("INSERT INTO t VALUES (2, 5)"), "total")
    await bench.commit(first.gid)
    assert bench.rows("SELECT x FROM total") == [(5,)]
    await bench.stop()


async def test_a_shared_lock_keeps_what_a_branch_decided_by(bench):
    # Without it each of the two would see the other's row as it was, and both would go ahead (write skew).
    first = await bench.prepare(
        op="share", account="ann", statements=["UPDATE account SET balance = 0 WHERE name = 'bob'"]
    )
    assert isinstance(first, Prepared)
    second = await bench.prepare(op="share", account="bob", statements=[SPEND])
    assert locked(second)
    assert locked(await bench.prepare(SPEND)), "nobody changes what is shared"
    third = await bench.prepare(op="share", account="ann", statements=[])
    assert isinstance(third, Prepared), "two may share; and to hold a lock is something to decide about"
    await bench.commit(first.gid)
    await bench.abort(third.gid)
    assert isinstance(await bench.prepare(SPEND), Prepared)


async def test_a_shared_lock_on_a_row_that_is_not_there_keeps_it_away(bench):
    vote = await bench.prepare(op="share", account="dee", statements=[])
    assert locked(await bench.prepare("INSERT INTO account VALUES ('dee', 1, NULL)"))
    await bench.commit(vote.gid)
    assert isinstance(await bench.prepare("INSERT INTO account VALUES ('dee', 1, NULL)"), Prepared)


_VALUES = st.one_of(
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.text(st.characters(codec="utf-8"), max_size=8),
    st.sampled_from(["it's", "a\0b", "Ä a ", "A ", "ß", "İ"]),
    st.binary(max_size=4),
)
_MEMORY = apsw.Connection(":memory:")


@given(value=_VALUES, collation=st.sampled_from(["BINARY", "NOCASE", "RTRIM"]))
def test_the_guards_and_the_locks_write_a_key_alike(value, collation):
    key = Key(table="t", name="", columns=(0,), column_names=("c",), collations=(collation,))
    query = f"SELECT {key.expression('NEW')} FROM (SELECT ? AS {quoted('c')}) AS NEW"
    assert key.text([value]) == _MEMORY.execute(query, (value,)).get


@given(one=_VALUES, other=_VALUES, collation=st.sampled_from(["BINARY", "NOCASE", "RTRIM"]))
def test_values_that_sqlite_takes_for_equal_have_the_same_key(one, other, collation):
    key = Key(table="t", name="", columns=(0,), column_names=("c",), collations=(collation,))
    if _MEMORY.execute(f"SELECT ? = ? COLLATE {collation}", (one, other)).get:
        assert key.text([one]) == key.text([other])


# ------------------------------------------------------------------------------------------------ other connections


async def test_other_connections_cannot_change_locked_rows(bench):
    await bench.prepare(
        SPEND, "INSERT INTO account VALUES ('dee', 1, 'dee@shop')", "DELETE FROM account WHERE name = 'cy'"
    )
    for statement in (
        "UPDATE account SET balance = 0 WHERE name = 'ann'",
        "DELETE FROM account WHERE name = 'ann'",
        "INSERT INTO account VALUES ('dee', 2, NULL)",
        "UPDATE account SET email = 'dee@shop' WHERE name = 'bob'",
        "UPDATE account SET name = 'dee' WHERE name = 'bob'",
        "INSERT OR REPLACE INTO account VALUES ('ann', 0, NULL)",
        "INSERT OR IGNORE INTO account VALUES ('eve', 0, 'dee@shop')",
        "UPDATE account SET balance = 0 WHERE name = 'cy'",
    ):
        with pytest.raises(apsw.ConstraintError, match="locked by a prepared transaction: account"):
            bench.other.execute(statement)
    bench.other.execute("UPDATE account SET balance = 55 WHERE name = 'bob'")
    assert bench.balance("bob") == 55


async def test_other_connections_may_change_parents_of_prepared_rows_but_not_remove_them(bench):
    await bench.prepare("INSERT INTO entry VALUES ('e1', 'ann')")
    bench.other.execute("UPDATE account SET balance = 55 WHERE name = 'ann'")
    with pytest.raises(apsw.ConstraintError, match="locked by"):
        bench.other.execute("DELETE FROM account WHERE name = 'ann'")
    with pytest.raises(apsw.ConstraintError, match="locked by"):
        bench.other.execute("UPDATE account SET name = 'anna' WHERE name = 'ann'")


async def test_who_goes_around_the_guard_is_found_out_at_the_commit(bench, caplog):
    victim = await bench.prepare(SPEND)
    bystander = await bench.prepare("UPDATE account SET balance = 1 WHERE name = 'bob'")
    bench.other.config(apsw.SQLITE_DBCONFIG_ENABLE_TRIGGER, 0)
    bench.other.execute("UPDATE account SET balance = 3 WHERE name = 'ann'")
    with caplog.at_level(logging.ERROR):
        answers = await bench.handle(
            *(Envelope(Commit(gid=each.gid, branch="b"), Stamp(epoch=1)) for each in (victim, bystander))
        )
    assert answers == [
        Contradicted(gid=victim.gid, branch="b", state="prepared"),
        Acked(gid=bystander.gid, branch="b"),
    ]
    assert "ALARM" in caplog.text
    assert (bench.balance("ann"), bench.balance("bob")) == (3, 1)
    assert [each.gid for each in await bench.manager.in_doubt()] == [victim.gid]
    bench.other.execute("UPDATE account SET balance = 100 WHERE name = 'ann'")
    assert isinstance(await bench.commit(victim.gid), Acked), "once a person has put it right"
    assert bench.balance("ann") == 90


async def test_a_table_that_is_gone_is_not_acked(bench, caplog):
    vote = await bench.prepare("INSERT INTO entry VALUES ('e1', 'ann')")
    bench.other.execute("DROP TABLE entry")
    with caplog.at_level(logging.ERROR):
        assert isinstance(await bench.commit(vote.gid), Contradicted)
    assert "ALARM" in caplog.text


async def test_a_writer_that_does_not_let_go_makes_the_batch_unknown(tmp_path):
    bench = Bench(tmp_path, busy_within_s=0.05)
    await bench.start()
    bench.other.execute("BEGIN IMMEDIATE")
    with pytest.raises(Unavailable, match="another connection writes"):
        await bench.prepare(SPEND)
    bench.other.execute("ROLLBACK")
    assert isinstance(await bench.prepare(SPEND), Prepared)
    await bench.stop()


# ------------------------------------------------------------------------------------------------ bad operations


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        ({"op": "fail", "how": "refuse"}, "not today"),
        ({"op": "fail", "how": "raise"}, "operation_failed"),
        ({"op": "fail", "how": "exit"}, "operation_failed"),
        ({"op": "fail", "how": "unserializable"}, "operation_failed"),
        ({"op": "fail", "how": "large"}, "result_too_large"),
        ({"op": "nothing"}, "unknown_operation: nothing"),
        ({"op": 3}, "bad_payload"),
        ({"how": "refuse"}, "bad_payload"),
        ({"op": "fail"}, "bad_arguments: fail needs how"),
        ({"op": "fail", "how": 3}, "bad_arguments: how of fail must be a string"),
        ({"op": "fail", "how": "refuse", "more": 1}, "bad_arguments: fail takes no more"),
        ({"op": "sql", "statements": ["CREATE TABLE t(x)"]}, "not_allowed: an operation cannot change the schema"),
        ({"op": "sql", "statements": [SPEND, "COMMIT"]}, "not_allowed: transaction"),
        ({"op": "sql", "statements": [SPEND, "RELEASE outlast_work"]}, "not_allowed: savepoint"),
        ({"op": "sql", "statements": [SPEND, "SELECT 1; COMMIT"]}, "not_allowed: transaction"),
        ({"op": "sql", "statements": ["PRAGMA synchronous = OFF"]}, "not_allowed: pragma"),
        ({"op": "sql", "statements": ["ATTACH ':memory:' AS x"]}, "not_allowed: attach"),
        ({"op": "sql", "statements": ["CREATE TEMP TABLE t(x)"]}, "not_allowed"),
        ({"op": "sql", "statements": ["DELETE FROM outlast_lock"]}, "not_allowed: table outlast_lock"),
        ({"op": "sql", "statements": ["DELETE FROM sqlite_schema"]}, ""),
        ({"op": "sql", "statements": ["SELECT nonsense"]}, "operation_failed"),
        ({"op": "sql", "statements": ["INSERT INTO account VALUES ('dee', NULL, NULL)"]}, "constraint: NOT NULL"),
        (
            {"op": "sql", "statements": ["INSERT OR ROLLBACK INTO account VALUES ('ann', 1, NULL)"]},
            "constraint: UNIQUE",
        ),
    ],
)
async def test_whatever_an_operation_does_it_only_loses_its_own_vote(bench, caplog, payload, reason):
    await bench.done("UPDATE account SET balance = 4 WHERE name = 'bob'")
    before, bad, after = await bench.handle(
        bench.prepare_of("UPDATE account SET balance = 1 WHERE name = 'bob'"),
        bench.prepare_of(**payload),
        bench.prepare_of("UPDATE account SET balance = 2 WHERE name = 'cy'"),
    )
    assert isinstance(bad, Refused)
    assert bad.reason.startswith(reason)
    assert "secret" not in bad.reason
    assert isinstance(before, Prepared)
    assert isinstance(after, Prepared)
    assert isinstance(await bench.commit(before.gid), Acked)
    assert (bench.balance("ann"), bench.balance("bob"), bench.balance("cy")) == (100, 1, 100)
    if reason == "operation_failed":
        assert "Traceback" in caplog.text


@pytest.mark.parametrize("writes", [False, True])
async def test_sql_that_takes_too_long_is_refused(tmp_path, writes):
    bench = Bench(tmp_path, operation_within_s=0.05)
    await bench.start()
    endless = "WITH RECURSIVE c(x) AS (VALUES(0) UNION ALL SELECT x + 1 FROM c) SELECT count(*) FROM c"
    if writes:
        endless = f"UPDATE account SET balance = ({endless})"
    # An interrupted write takes the whole transaction with it, so the others' work is done again.
    good, slow = await bench.handle(bench.prepare_of(SPEND), bench.prepare_of(endless))
    assert isinstance(good, Prepared)
    assert slow == Refused(gid=slow.gid, branch="b", reason="too_slow", retryable=True)
    await bench.commit(good.gid)
    assert bench.balance("ann") == 90
    await bench.stop()


async def test_a_branch_cannot_be_used_after_its_operation(tmp_path):
    escaped = []
    ops = Operations()

    @ops.operation("escape")
    def escape(branch: SqliteBranch) -> None:
        escaped.append(branch)
        escaped.append(branch.execute("SELECT * FROM account"))

    bench = Bench(tmp_path, ops=ops)
    await bench.start()
    assert isinstance(await bench.prepare(op="escape"), ReadOnly)
    with pytest.raises(RuntimeError):
        escaped[0].execute("SELECT 1")
    with pytest.raises(apsw.CursorClosedError):
        next(escaped[1])
    await bench.stop()


async def test_there_is_a_limit_to_what_is_prepared_and_to_its_size(tmp_path):
    bench = Bench(tmp_path, batch_limit=2, prepared_limit=2, redo_limit_bytes=1000)
    await bench.start()
    large = await bench.prepare("INSERT INTO account VALUES ('dee', 1, hex(zeroblob(2000)))")
    assert large.reason.startswith("changes_too_large")
    votes = [await bench.prepare(f"INSERT INTO account VALUES ('n{i}', 1, NULL)") for i in range(3)]
    assert [type(vote) for vote in votes] == [Prepared, Prepared, Refused]
    assert (votes[2].reason, votes[2].retryable) == ("too_many_prepared", True)
    await bench.abort(votes[0].gid)
    again = await bench.prepare("INSERT INTO account VALUES ('n9', 1, NULL)")
    assert isinstance(again, Prepared)
    await bench.commit(again.gid)
    await bench.restart()
    assert isinstance(await bench.prepare(SPEND), Prepared)
    assert isinstance(await bench.prepare("DELETE FROM account WHERE name = 'cy'"), Refused)
    await bench.stop()


def test_operations_are_checked_when_they_are_registered():
    def fit(branch: SqliteBranch) -> None: ...

    def bare(branch: SqliteBranch, x) -> None: ...

    def odd(branch: SqliteBranch, x: complex) -> None: ...

    ops = Operations()
    ops.operation("one")(fit)
    with pytest.raises(ValueError, match="twice"):
        ops.operation("one")(fit)
    with pytest.raises(TypeError, match="annotation"):
        ops.operation("two")(bare)
    with pytest.raises(TypeError, match="complex"):
        ops.operation("three")(odd)
    assert ops.names == ("one",)


# ------------------------------------------------------------------------------------------------ the disk


async def test_a_full_disk_makes_the_batch_unknown_and_the_next_one_works(bench):
    kept = await bench.prepare(SPEND)
    assert isinstance(kept, Prepared)
    # The limit belongs to the connection, so it is gone with it.
    await bench.manager._call(lambda: bench.manager._store._db.pragma("max_page_count", 1))
    grow = bench.prepare_of("INSERT INTO account VALUES ('dee', 1, hex(zeroblob(100000)))")
    with pytest.raises(Unavailable, match="Full"):
        await bench.handle(bench.prepare_of("UPDATE account SET balance = 1 WHERE name = 'bob'"), grow)
    assert [each.gid for each in await bench.manager.in_doubt()] == [kept.gid]
    assert isinstance((await bench.handle(grow))[0], Prepared)
    assert isinstance(await bench.commit(kept.gid), Acked)


class FaultyFile(apsw.VFSFile):
    def __init__(self, vfs, name, flags):
        self._vfs = vfs
        super().__init__("", name, flags)

    def xSync(self, flags):  # noqa: N802  # SQLite's name
        self._vfs.syncs += 1
        if self._vfs.failing:
            self._vfs.failed += 1
            raise apsw.IOError("the device says no")
        super().xSync(flags)


class FaultyVfs(apsw.VFS):
    def __init__(self, name):
        self.syncs = self.failed = 0
        self.failing = False
        super().__init__(name, "")

    def xOpen(self, name, flags):  # noqa: N802  # SQLite's name
        return FaultyFile(self, name, flags)


@pytest.fixture
async def faulty(tmp_path):
    bench = Bench(tmp_path)
    disk = FaultyVfs("faulty")
    bench.vfs = "faulty"
    await bench.start()
    yield bench, disk
    await bench.stop()
    disk.unregister()


async def test_one_sync_pays_for_a_whole_batch(faulty):
    bench, disk = faulty
    warm = await bench.prepare(SPEND)
    before = disk.syncs
    votes = await bench.handle(
        Envelope(Commit(gid=warm.gid, branch="b"), Stamp(epoch=1)),
        *(bench.prepare_of(f"INSERT INTO account VALUES ('n{i}', 1, NULL)") for i in range(50)),
    )
    assert all(isinstance(vote, (Acked, Prepared)) for vote in votes)
    assert disk.syncs - before == 1


async def test_nothing_is_synced_when_nothing_changed(faulty):
    bench, disk = faulty
    vote = await bench.prepare(SPEND)
    before = disk.syncs
    assert await bench.prepare(SPEND, gid=vote.gid) == vote
    assert disk.syncs == before


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_a_failed_sync_is_no_vote(faulty):
    bench, disk = faulty
    await bench.done(SPEND)
    disk.failing = True
    request = bench.prepare_of("UPDATE account SET balance = 1 WHERE name = 'bob'")
    with pytest.raises(Unavailable, match="IO"):
        await bench.handle(request)
    assert disk.failed, "the fault must have been met"
    disk.failing = False
    assert isinstance((await bench.handle(request))[0], Prepared)
    assert isinstance(await bench.commit(request.message.gid), Acked)
    assert (bench.balance("ann"), bench.balance("bob")) == (90, 1)


async def test_what_is_no_database_is_refused_at_the_start(tmp_path):
    (tmp_path / "shop.db").write_text("no database at all, but quite a long text " * 50)
    bench = Bench(tmp_path)
    with pytest.raises(apsw.NotADBError):
        await bench.start()
    await bench.manager.close()


# ------------------------------------------------------------------------------------------------ many at once


@pytest.mark.parametrize("seed", range(4))
async def test_any_mixture_of_branches_ends_as_the_committed_ones_say(tmp_path, seed):
    import random

    rng = random.Random(seed)
    bench = Bench(tmp_path)
    await bench.start()
    expected = {"ann": 100, "bob": 100, "cy": 100}
    held: dict[str, dict[str, int]] = {}
    votes = 0
    for _ in range(60):
        batch, moves = [], {}
        for gid in rng.sample(sorted(held), rng.randint(0, len(held))):
            if rng.random() < 0.7:
                batch.append(Envelope(Commit(gid=gid, branch="b"), Stamp(epoch=1)))
                for name, amount in held.pop(gid).items():
                    expected[name] += amount
            else:
                batch.append(Envelope(Abort(gid=gid, branch="b"), Stamp(epoch=1)))
                del held[gid]
        for _ in range(rng.randint(0, 4)):
            names, amount = rng.sample(sorted(expected), 2), rng.randint(1, 9)
            move = {names[0]: -amount, names[1]: amount}
            request = bench.prepare_of(
                *(f"UPDATE account SET balance = balance + {n} WHERE name = '{name}'" for name, n in move.items())
            )
            batch.append(request)
            moves[request.message.gid] = move
        for answer in await bench.handle(*batch) if batch else ():
            assert isinstance(answer, (Acked, Prepared)) or locked(answer), answer
            if isinstance(answer, Prepared):
                votes += 1
                held[answer.gid] = moves[answer.gid]
        assert {name: bench.balance(name) for name in expected} == expected
        if rng.random() < 0.1:
            assert {each.gid for each in await bench.restart()} == set(held)
    assert votes > 20
    await bench.stop()


async def test_the_event_loop_is_free_while_a_batch_runs(tmp_path):
    ops = Operations()

    @ops.operation("slow")
    def slow(branch: SqliteBranch) -> None:
        time.sleep(0.2)

    bench = Bench(tmp_path, ops=ops)
    await bench.start()
    task = asyncio.ensure_future(bench.prepare(op="slow"))
    turns = 0
    while not task.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns > 10
    assert isinstance(task.result(), ReadOnly)
    await bench.stop()
