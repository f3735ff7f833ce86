"""How branches are called in MariaDB: names that say everything, and are nobody else's."""

import re
import sys
from pathlib import Path

import pytest

from coordinator.protocol.messages import Gid
from participants.mariadb_branch import MariaDbBranch
from participants.mariadb_names import TABLES, Xid, database_tag, marker_statement, named, pattern, unfit, xid_of
from participants.operations import Operations
from participants.prepared import Unfit

LONGEST_GID = "a" * 24 + "-8388607-999999999999"


@pytest.mark.parametrize("gid", ["shop-1-1", "shop-eu-2-12-345", LONGEST_GID])
@pytest.mark.parametrize("branch", ["b", "inventory", "a-1", "x" * 64, "it's", "größe", "a b", "%_!", "\\"])
@pytest.mark.parametrize("connection", [0, 17, 2**32 - 1])
def test_a_name_tells_which_branch_it_is_and_who_prepared_it(gid, branch, connection):
    xid = xid_of(gid, branch, database="shop", connection=connection)
    assert len(xid.gtrid) <= 64
    assert len(xid.bqual) <= 64
    found = named(xid, database="shop")
    assert found is not None
    assert found.key == (gid, branch)
    assert found.owner == connection
    assert named(xid, database="shops") is None, "another database's"
    assert re.fullmatch(r"('[A-Za-z0-9 ._-]*'|X'[0-9a-f]*'),('[A-Za-z0-9 ._-]*'|X'[0-9a-f]*')", xid.sql)


@pytest.mark.parametrize(
    ("gtrid", "bqual"),
    [
        *((b"shop-1-1", b"b"), (b"shop-1-1_abcdefg", b"b"), (b"shop-1-1_ABCDEFG_5", b"b"), (b"\xff\x00", b"b")),
        *((b"shop-01-1_%s_5", b"b"), (b"shop-1-1_%s_05", b"b"), (b"shop-1-1_%s_5", b""), (b"shop-1-1_%s_5", b"\xff")),
        *((b"shop_%s_5", b"b"), (b"shop-1-1_%s_5 ", b"b"), (b"Shop-1-1_%s_5", b"b")),
    ],
)
def test_names_of_strangers_are_nobody_s(gtrid, bqual):
    tag = database_tag("shop").encode()
    assert named(Xid(gtrid.replace(b"%s", tag), bqual), database="shop") is None


def like(text, wanted):
    """What LIKE does, with ! as its escape."""
    parts = re.findall(r"!.|.", wanted, re.DOTALL)
    rule = "".join({"%": ".*", "_": "."}.get(part, re.escape(part[-1])) for part in parts)
    return re.fullmatch(rule, text, re.DOTALL) is not None


@pytest.mark.parametrize("branch", ["b", "größe", "a_b", "a%b", "it's"])
def test_statements_that_may_make_a_branch_prepared_are_found_by_their_text(branch):
    wanted = pattern("shop-1-1", branch, database="shop")
    for connection in (3, 4_000_000_000):
        xid = xid_of("shop-1-1", branch, database="shop", connection=connection)
        assert like(f"XA PREPARE {xid.sql}", wanted)
        assert like(marker_statement("shop-1-1", branch, database="shop", connection=connection), wanted)
    for gid, name, database in (
        *(("shop-1-11", branch, "shop"), ("shop-1-1", branch + "x", "shop"), ("shop-1-1", branch, "shops")),
        *(("eshop-1-1", branch, "shop"), ("shop-1-1", "x" + branch, "shop")),
    ):
        other = xid_of(gid, name, database=database, connection=3)
        assert not like(f"XA PREPARE {other.sql}", wanted)


@pytest.mark.parametrize(
    ("gid", "branch", "why"),
    [
        ("shop-1-1", "x" * 65, "unfit_branch"),
        ("shop-1-1", "é" * 33, "unfit_branch"),
        ("shop-1-1", "\ud800", "unfit_branch"),
        ("shop-9999999-1", "b", "unfit_gid"),
        ("shop-1-1", "b", None),
    ],
)
def test_what_cannot_be_called_anything(gid, branch, why):
    parsed = Gid.parse(gid)
    found = unfit(parsed, branch)
    assert found is None if why is None else found.startswith(why)


def test_wrong_words_are_errors():
    for gid, connection in (("nonsense", 1), ("shop-1-1", -1), ("shop-1-1", 2**32)):
        with pytest.raises(ValueError, match=r"nonsense|-1|4294967296"):
            xid_of(gid, "b", database="shop", connection=connection)


class Recorded:
    def __init__(self):
        self.heard = []

    async def run(self, sql, parameters=()):
        self.heard.append(sql)
        return 1, 0, None


@pytest.mark.parametrize(
    ("sql", "only_reads"),
    [
        *(("SELECT 1", True), ("  select 1 ;", True), ("(SELECT 1)", True), ("/* why */ SELECT 1", True)),
        *(("-- why\nSELECT 1", True), ("SELECT 1 FOR UPDATE", False), ("SELECT 1 LOCK IN SHARE MODE", False)),
        *(("UPDATE t SET v = 1", False), ("WITH a AS (SELECT 1) SELECT * FROM a", False), ("CALL p()", False)),
        *(("INSERT INTO t VALUES (1)", False), ("SHOW TABLES", False), ("replace t values (1)", False)),
    ],
)
async def test_statements_on_rows_are_run(sql, only_reads):
    runs = Recorded()
    branch = MariaDbBranch("shop-1-1", "b", runs)
    await branch.execute(sql)
    assert (branch.only_reads, runs.heard, branch.failure) == (only_reads, [sql], None)


@pytest.mark.parametrize(
    "sql",
    [
        *(
            "XA COMMIT 'x'",
            "COMMIT",
            "begin",
            "SET @a = 1",
            "DROP TABLE t",
            "SELECT 1; COMMIT",
            "",
            "/*!50000 COMMIT */",
        ),
        *("/*M!100100 XA END 'x' */ SELECT 1", "LOCK TABLES t READ", "KILL 7", "USE other", "-- SELECT 1", "PREPARE s"),
    ],
)
async def test_others_are_not_and_the_branch_has_failed(sql):
    runs = Recorded()
    branch = MariaDbBranch("shop-1-1", "b", runs)
    with pytest.raises(ValueError, match=r"an operation only|one statement at a time"):
        await branch.execute(sql)
    assert runs.heard == []
    with pytest.raises(RuntimeError, match="can only be refused"):
        await branch.execute("SELECT 1")
    assert runs.heard == []


def test_without_its_driver_it_says_what_to_install(monkeypatch):
    for name in [each for each in sys.modules if each.partition(".")[0] == "asyncmy"]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("session", "database", "errors", "owners", "checks"):
        monkeypatch.delitem(sys.modules, f"participants.mariadb_{name}", raising=False)
    monkeypatch.setitem(sys.modules, "asyncmy", None)
    from participants.mariadb import MariaDbManager

    with pytest.raises(Unfit, match=r"pip install 'outlast\[mariadb\]'"):
        MariaDbManager("mariadb://localhost/d", Operations())


def test_the_manual_has_the_tables_as_they_are():
    manual = (Path(__file__).parents[2] / "docs" / "MARIADB.md").read_text()
    for table in TABLES:
        assert f"{table.strip()};" in manual
