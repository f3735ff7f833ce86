"""What the doctor makes of facts, and that its exit status never says "well" of what it has not seen."""

from pathlib import Path

import pytest

from cluster.answers import NODE, fits
from cluster.cli import parser
from cluster.commands.tx import participant_access
from cluster.doctor import cluster, mariadb, participants, postgres
from cluster.doctor.cluster import ClusterFacts, NodeFacts
from cluster.doctor.findings import Finding, Report, Severity, Status, Unseen
from cluster.doctor.mariadb import MariaDbFacts, Transaction
from cluster.doctor.participants import ParticipantFacts
from cluster.doctor.postgres import Lock, PostgresFacts, Prepared, Waiter, waiters_behind
from cluster.doctor.standing import Kind, PreparedBranch, Standing, judge, standing_of
from cluster.layout import Running, write_running
from participants.mariadb_names import Xid

WELL = {
    "max_prepared_transactions": "64", "fsync": "on", "full_page_writes": "on", "synchronous_commit": "on",
    "transaction_read_only": "off", "client_connection_check_interval": "100ms", "server_version": "18",
}  # fmt: skip
GID = "shop-1-7"


def finding(severity):
    return Finding(severity=severity, code="x", where="here", what="something", todo="this")


# ------------------------------------------------------------------------------------------------ the exit status


@pytest.mark.parametrize(
    ("severities", "unseen", "status"),
    [
        ([], False, Status.WELL),
        ([Severity.INFO], False, Status.WELL),
        ([Severity.INFO, Severity.WARNING], False, Status.WARNING),
        ([Severity.WARNING, Severity.CRITICAL], False, Status.CRITICAL),
        ([], True, Status.NOT_SEEN),
        ([Severity.WARNING], True, Status.NOT_SEEN),
        ([Severity.CRITICAL], True, Status.CRITICAL),
    ],
)
def test_the_exit_status_is_the_worst(severities, unseen, status):
    report = Report(findings=[finding(each) for each in severities], seen=["node n1"])
    if unseen:
        report.unseen.append(Unseen(where="there", why="no answer"))
    assert report.status is status
    assert report.to_json()["status"] == status.name.lower()


def test_who_has_seen_nothing_does_not_say_that_all_is_well():
    assert Report().status is Status.NOT_SEEN


def test_the_worst_comes_first_and_of_these_the_oldest():
    report = Report(
        findings=[
            finding(Severity.INFO),
            Finding(severity=Severity.CRITICAL, code="new", where="a", what="", todo="", since=9.0),
            Finding(severity=Severity.CRITICAL, code="old", where="b", what="", todo="", since=1.0),
        ]
    )
    assert [each.code for each in report.sorted()] == ["old", "new", "x"]


# ------------------------------------------------------------------------------------------------ one branch


def branch(age_s=100.0, waiters=()):
    ending = {"commit": "COMMIT PREPARED 'g'", "abort": "ROLLBACK PREPARED 'g'"}
    return PreparedBranch(
        where="db", name="g", gid=GID, branch="orders", age_s=age_s, ending=ending, waiters=waiters
    )  # fmt: skip


@pytest.mark.parametrize(
    ("standing", "severity", "says", "todo"),
    [
        (Standing(kind=Kind.DECIDED, decision="commit"), Severity.WARNING, "decided to commit", "COMMIT PREPARED 'g'"),
        (Standing(kind=Kind.IN_FLIGHT), Severity.WARNING, "not decided yet", f"outlast tx abort {GID}"),
        (Standing(kind=Kind.UNKNOWN), Severity.WARNING, "never heard of it", "ROLLBACK PREPARED 'g'"),
        (Standing(kind=Kind.FORGOTTEN), Severity.CRITICAL, "has forgotten it", "COMMIT PREPARED 'g' or ROLLBACK"),
        (Standing(kind=Kind.NOT_SEEN), Severity.WARNING, "could not be asked", "before you know its outcome"),
        (
            Standing(kind=Kind.DECIDED, decision="commit", resolved={"orders": "abort"}),
            Severity.WARNING,
            "decided to commit",
            "resolved it by hand (abort), and it is still prepared: run ROLLBACK PREPARED 'g'",
        ),
    ],
)
def test_a_branch_that_is_prepared_for_too_long(standing, severity, says, todo):
    found = judge(branch(), standing, limit_s=60)
    assert found is not None
    assert (found.severity, says in found.what, todo in found.todo) == (severity, True, True), found
    assert judge(branch(waiters=("pid 7",)), standing, limit_s=60).severity is Severity.CRITICAL  # type: ignore[union-attr]
    young = judge(branch(age_s=1.0), standing, limit_s=60)
    assert (young is None) == (standing.kind is not Kind.FORGOTTEN), "what nobody can tell any more is told at once"


def test_somebody_elses_branch_is_information_whatever_its_age():
    for age_s in (1.0, 1e6):
        found = judge(branch(age_s=age_s), Standing(kind=Kind.FOREIGN), limit_s=60)
        assert found is not None
        assert (found.severity, found.code) == (Severity.INFO, "foreign_prepared")


def test_whose_a_gid_is():
    known = {GID: Standing(kind=Kind.IN_FLIGHT)}
    assert standing_of(GID, "shop", known).kind is Kind.IN_FLIGHT
    assert standing_of("shop-1-8", "shop", known).kind is Kind.NOT_SEEN
    assert standing_of("other-1-7", "shop", known).kind is Kind.FOREIGN
    assert standing_of("shop-x-1-7", "shop", known).kind is Kind.FOREIGN
    assert standing_of(GID, None, known).kind is Kind.NOT_SEEN, "without a cluster nobody knows whose it is"


# ------------------------------------------------------------------------------------------------ PostgreSQL


def waiter(pid, *behind, locktype="transactionid", xid=None, mode="ShareLock", object_=""):
    return Waiter(
        pid=pid,
        locktype=locktype,
        mode=mode,
        xid=xid,
        object=object_,
        age_s=float(pid),
        behind=behind,
        query="UPDATE x",
    )


HELD = Prepared(gid=f"outlast:{GID}:orders", xid="700", age_s=100.0, owner="shop", database="shop")
OTHER = Prepared(gid="theirs", xid="800", age_s=50.0, owner="they", database="shop")


def test_waiters_are_found_through_the_holder_that_has_no_pid():
    facts = PostgresFacts(
        where="db",
        settings=WELL,
        prepared=[HELD, OTHER],
        locks=[
            Lock(xid="700", locktype="relation", mode="RowExclusiveLock", object="5/100", relation="orders"),
            Lock(xid="800", locktype="relation", mode="AccessShareLock", object="5/100", relation="orders"),
        ],
        waiters=[
            waiter(11, 0, xid="700"),
            waiter(12, 11, locktype="tuple", mode="ExclusiveLock", object_="5/100/0/1"),
            waiter(13, 0, locktype="relation", mode="ShareLock", object_="5/100"),
            waiter(14, 0, locktype="relation", mode="AccessExclusiveLock", object_="5/200"),
            waiter(15, 99, xid="900"),
        ],
    )
    assert [each.pid for each in waiters_behind(facts, HELD)] == [13, 12, 11]
    assert waiters_behind(facts, OTHER) == [], "it holds nothing that they want"
    report = Report()
    postgres.judge(facts, report, cluster="shop", known={GID: Standing(kind=Kind.IN_FLIGHT)}, limit_s=60)
    worst, info = report.sorted()
    assert worst.severity is Severity.CRITICAL
    assert all(f"pid {pid}" in worst.what for pid in (11, 12, 13))
    assert "locks on orders (RowExclusiveLock)" in worst.what
    assert info.code == "foreign_prepared"


def test_locks_exclude_each_other_both_ways():
    conflicts = postgres._CONFLICTS
    assert len(conflicts) == 8
    for mode, others in conflicts.items():
        assert all(mode in conflicts[other] for other in others), mode


@pytest.mark.parametrize(
    ("setting", "value", "code", "severity"),
    [
        ("max_prepared_transactions", "0", "no_slots", Severity.CRITICAL),
        ("max_prepared_transactions", "2", "slots_full", Severity.CRITICAL),
        ("fsync", "off", "fsync_off", Severity.CRITICAL),
        ("full_page_writes", "off", "torn_pages", Severity.WARNING),
        ("synchronous_commit", "off", "synchronous_commit_off", Severity.WARNING),
        ("transaction_read_only", "on", "read_only", Severity.WARNING),
    ],
)
def test_dangerous_settings_of_postgres(setting, value, code, severity):
    report = Report()
    young = [Prepared(gid=f"outlast:{GID}:{i}", xid=str(i), age_s=0.1, owner="o", database="d") for i in range(2)]
    facts = PostgresFacts(where="db", settings={**WELL, setting: value}, prepared=young)
    postgres.judge(facts, report, cluster="shop", known={}, limit_s=60)
    assert [(each.code, each.severity) for each in report.findings] == [(code, severity)]
    assert report.findings[0].todo


def test_a_healthy_server_has_no_findings_and_one_that_was_not_reached_is_not_healthy():
    report = Report()
    postgres.judge(PostgresFacts(where="db", settings=WELL), report, cluster="shop", known={}, limit_s=60)
    assert (report.findings, report.seen, report.status) == ([], ["db"], Status.WELL)
    postgres.judge(PostgresFacts(where="db2", trouble="refused"), report, cluster="shop", known={}, limit_s=60)
    assert report.status is Status.NOT_SEEN


async def test_a_dsn_is_never_repeated():
    for dsn in ("postgresql://ann:secret@[", "postgresql://ann:secret@127.0.0.1:1/x"):
        facts = await postgres.look("db", dsn)
        assert facts.trouble
        assert "secret" not in facts.trouble


def test_a_transaction_that_holds_back_vacuum_is_critical():
    report = Report()
    old = Prepared(gid="theirs", xid="7", age_s=9e6, owner="o", database="d", xids=300_000_000)
    postgres.judge(
        PostgresFacts(where="db", settings=WELL, prepared=[old]), report, cluster="shop", known={}, limit_s=60
    )
    assert {each.code for each in report.findings} == {"foreign_prepared", "holds_back_vacuum"}


# ------------------------------------------------------------------------------------------------ the cluster


def says(node, leader="n1", **more):
    return {
        "cluster": "shop", "node": node, "leader": leader, "ready": leader is not None, "level": 2, "role": "follower",
        "trouble": None, "reconciling": False, "nodes": [{"id": f"n{i}", "understands": 2} for i in (1, 2, 3)], **more,
    }  # fmt: skip


def facts_of(*nodes, **more):
    lists = {"participants": [], "unfinished": [], "heuristics": [], **more}
    return ClusterFacts(
        nodes=[
            NodeFacts(url=f"http://n{i}", says=each, trouble=None if each else "refused")
            for i, each in enumerate(nodes, 1)
        ],
        now=1000.0,
        **lists,
    )


def judged(facts):
    report = Report()
    cluster.judge(facts, report, limit_s=60)
    return report


def codes(report):
    return [each.code for each in report.findings]


def test_a_healthy_cluster():
    report = judged(facts_of(says("n1"), says("n2"), says("n3")))
    assert (codes(report), report.status) == ([], Status.WELL)
    assert report.restart is not None
    assert (report.restart.helps, report.restart.why) == (False, "nothing is in flight")


@pytest.mark.parametrize(
    ("facts", "code", "status", "helps"),
    [
        (facts_of(says("n1"), says("n2"), None), "node_down", Status.WARNING, False),
        (
            facts_of(says("n1", None), None, None, participants=None, unfinished=None, heuristics=None),
            "no_leader", Status.CRITICAL, True,
        ),
        (facts_of(says("n1", None), says("n2", None), says("n3", None)), "no_leader", Status.CRITICAL, False),
        (facts_of(says("n1"), says("n2", trouble="disk full")), "node_trouble", Status.CRITICAL, False),
        (facts_of(says("n1"), says("n2", role="joining")), "node_joining", Status.WARNING, False),
        (facts_of(says("n1", level=3)), "node_behind", Status.WARNING, False),
        (facts_of(says("n1", reconciling=True)), "reconciling", Status.WARNING, False),
    ],
)  # fmt: skip
def test_nodes_in_trouble(facts, code, status, helps):
    report = judged(facts)
    assert code in codes(report)
    assert report.status is status
    assert report.restart is not None
    assert report.restart.helps is helps


def older(node):
    """What software says that knows no levels, no restore and no full disks."""
    whole = says(node, nodes=[{"id": f"n{i}", "url": f"http://n{i}"} for i in (1, 2, 3)])
    return {key: value for key, value in whole.items() if key not in ("level", "trouble", "reconciling")}


def test_nodes_of_older_software_are_nodes():
    assert fits(older("n1"), NODE)
    assert judged(facts_of(older("n1"), older("n2"), older("n3"))).status is Status.WELL
    mixed = says("n1", level=1, nodes=[{"id": f"n{i}", "understands": None if i == 2 else 2} for i in (1, 2, 3)])
    assert judged(facts_of(mixed, older("n2"), {**mixed, "node": "n3"})).status is Status.WELL


def test_a_node_that_knows_no_levels_is_behind_a_cluster_that_has_risen():
    (found,) = judged(facts_of(says("n1"), older("n2"), says("n3"))).findings
    assert (found.code, found.where) == ("node_behind", "node n2")


def test_no_answer_at_all_is_not_seen_and_blames_nobody():
    report = judged(facts_of(None, None))
    assert (report.findings, report.status) == ([], Status.NOT_SEEN)


TXN = {
    "gid": GID, "state": "committing", "decision": "commit", "started_at": "1970-01-01T00:10:00.000Z",
    "decided_at": "1970-01-01T00:10:01.000Z", "branches": [],
}  # fmt: skip


def test_why_each_is_not_finished_and_that_a_restart_changes_nothing():
    waits = {"for": "ack", "branch": "orders", "participant": "orders", "trouble": "refused", "down_since": "then"}
    undecided = {**TXN, "gid": "shop-1-8", "state": "preparing", "decision": None, "waiting_for": []}
    report = judged(facts_of(says("n1"), unfinished=[{**TXN, "waiting_for": [waits]}, undecided]))
    assert codes(report) == ["transaction_stuck", "transaction_stuck"]
    (why,) = report.in_flight[0].why
    assert why == "waits for the acknowledgement of orders (branch orders), which has not answered since then: refused"
    assert "--commit" in report.findings[0].todo
    assert "outlast tx abort shop-1-8" in report.findings[1].todo
    assert report.restart is not None
    assert not report.restart.helps
    assert "orders would not answer a new leader either" in report.restart.why


def test_heuristics_are_critical_until_resolved_and_warned_of_until_acknowledged():
    mad = {"branch": "orders", "heuristic": "aborted"}
    by_hand = {**mad, "resolved": {"outcome": "abort", "at": "1970-01-01T00:10:05.000Z", "note": None}}
    contradicted = {**TXN, "heuristic": "contradicted", "branches": [mad]}
    mixed = {**TXN, "heuristic": "mixed", "branches": [by_hand]}
    report = judged(facts_of(says("n1"), heuristics=[contradicted, mixed], unfinished=[contradicted]))
    assert [(each.code, each.severity) for each in report.findings] == [
        ("contradicted", Severity.CRITICAL), ("resolved_by_hand", Severity.WARNING)
    ]  # fmt: skip
    assert f"outlast tx resolve {GID} --branch orders" in report.findings[0].todo
    assert "against the decision" in report.findings[1].what
    assert f"outlast tx acknowledge {GID}" in report.findings[1].todo
    assert report.findings[1].since == 605.0


def test_of_those_that_older_software_shows_only_heuristic_ones_are_judged():
    """It does not know `heuristic=true`, and answers with all."""
    assert judged(facts_of(says("n1"), heuristics=[TXN])).findings == []


def test_a_participant_that_is_down_is_critical_once_something_is_owed_for_long():
    row = {"name": "orders", "url": "http://o", "reachable": False, "trouble": "refused", "owed": 1}
    for since, owed, severity in (
        ("1970-01-01T00:10:00Z", 1, Severity.CRITICAL),
        ("1970-01-01T00:10:00Z", 0, Severity.WARNING),
        ("1970-01-01T00:16:39Z", 1, Severity.WARNING),
    ):
        (found,) = judged(facts_of(says("n1"), participants=[{**row, "down_since": since, "owed": owed}])).findings
        assert (found.code, found.severity) == ("participant_down", severity)


# ------------------------------------------------------------------------------------------------ participants


def test_what_a_participant_holds_and_that_a_silent_one_was_not_seen():
    report = Report()
    rows = [
        {"gid": GID, "branch": "orders", "prepared_at": 900.0},
        {"gid": "x-1-1", "branch": "o", "prepared_at": None},
    ]
    facts = ParticipantFacts(name="orders", url="http://o", branches=rows, total=2, now=1000.0)
    participants.judge(facts, report, cluster="shop", known={GID: Standing(kind=Kind.UNKNOWN)}, limit_s=60)
    assert codes(report) == ["prepared_too_long", "foreign_prepared"]
    silent = Report()
    facts = ParticipantFacts(name="orders", url="http://o", trouble="refused", silent=True)
    participants.judge(facts, silent, cluster="shop", known={}, limit_s=60)
    assert (codes(silent), silent.status) == (["participant_silent"], Status.NOT_SEEN)
    unauthorized = Report(seen=["node n1"])
    facts = ParticipantFacts(name="orders", url="http://o", trouble="show a bearer token")
    participants.judge(facts, unauthorized, cluster="shop", known={}, limit_s=60)
    assert (codes(unauthorized), unauthorized.status) == ([], Status.NOT_SEEN)


# ------------------------------------------------------------------------------------------------ MariaDB

MARIADB = {
    "innodb_flush_log_at_trx_commit": "1", "log_bin": "OFF", "sync_binlog": "0", "innodb_doublewrite": "ON",
    "read_only": "OFF", "wsrep_on": "OFF", "legacy_xa_rollback_at_disconnect": "OFF",
}  # fmt: skip
OURS, OURS_TOO = Xid(b"shop-1-7_rwiaduz_42", b"orders"), Xid(b"shop-1-8_rwiaduz_43", b"orders")
THEIRS = Xid(b"theirs", b"x")


def trx(id_, connection=0, age_s=100.0):
    return Transaction(id=id_, connection=connection, age_s=age_s, rows=1, query="?")


@pytest.mark.parametrize(
    ("prepared", "transactions", "expected"),
    [
        ([OURS], [trx(1, 42)], [(1, (OURS,))]),
        ([OURS], [trx(1)], [(1, (OURS,))]),
        ([OURS, THEIRS], [trx(1), trx(2, 9)], [(1, (OURS,))]),
        ([OURS, THEIRS], [trx(1), trx(2)], [(1, (OURS, THEIRS)), (2, (OURS, THEIRS))]),
        ([OURS, OURS_TOO], [trx(1), trx(2, 43)], [(2, (OURS_TOO,)), (1, (OURS,))]),
        ([OURS, OURS_TOO], [trx(1), trx(2)], [(1, (OURS, OURS_TOO)), (2, (OURS, OURS_TOO))]),
    ],
    ids=["connected", "left", "a stranger is connected", "a stranger left, too", "one of two left", "two left"],
)
def test_names_and_transactions_are_joined_only_where_that_is_certain(prepared, transactions, expected):
    facts = MariaDbFacts(where="db", settings=MARIADB, prepared=prepared, transactions=transactions)
    assert [(holder.id, names) for holder, names in mariadb.holders(facts)] == expected


def test_who_waits_behind_a_branch_of_mariadb_and_behind_those():
    facts = MariaDbFacts(
        where="db",
        settings=MARIADB,
        prepared=[OURS],
        transactions=[trx(1), trx(2, 8, 9.0), trx(3, 9, 8.0), trx(4, 10)],
        waits=[(2, 1), (3, 2), (3, 1), (4, 5)],
        locks=[(1, "shop.stock (X record)")],
    )
    assert [each.id for each in mariadb.behind(facts, facts.transactions[0])] == [2, 3]
    report = Report()
    known = {"shop-1-7": Standing(kind=Kind.DECIDED, decision="commit")}
    mariadb.judge(facts, report, cluster="shop", known=known, limit_s=60)
    (found,) = report.findings
    assert (found.severity, found.code) == (Severity.CRITICAL, "prepared_too_long")
    assert "connection 8" in found.what
    assert "shop.stock (X record)" in found.what
    assert "XA COMMIT 'shop-1-7_rwiaduz_42','orders';" in found.todo


def test_where_mariadb_hides_which_one_the_set_is_named():
    known = {"shop-1-7": Standing(kind=Kind.DECIDED, decision="commit"), "shop-1-8": Standing(kind=Kind.IN_FLIGHT)}
    facts = MariaDbFacts(
        where="db",
        settings=MARIADB,
        prepared=[OURS, OURS_TOO],
        transactions=[trx(1), trx(2, age_s=1.0), trx(3, 8)],
        waits=[(3, 1)],
        metadata=[(11, 70.0, "ALTER TABLE stock"), (12, 1.0, "ALTER TABLE stock")],
    )
    report = Report()
    mariadb.judge(facts, report, cluster="shop", known=known, limit_s=60)
    one, table = report.sorted()
    assert (one.code, one.severity) == ("one_prepared_too_long", Severity.CRITICAL)
    assert "'orders' (commit)" in one.what
    assert "'orders' (in flight)" in one.what
    assert (table.code, table.about) == ("waits_for_table", ("11",))


def test_whoever_still_owns_a_branch_has_to_go_first():
    facts = MariaDbFacts(where="db", settings=MARIADB, prepared=[OURS], transactions=[trx(1, 42)])
    report = Report()
    mariadb.judge(facts, report, cluster="shop", known={"shop-1-7": Standing(kind=Kind.UNKNOWN)}, limit_s=60)
    assert "first KILL 42" in report.findings[0].todo


@pytest.mark.parametrize(
    ("settings", "code", "severity"),
    [
        ({"innodb_flush_log_at_trx_commit": "0"}, "flush_off", Severity.CRITICAL),
        ({"log_bin": "ON"}, "binlog_not_synced", Severity.CRITICAL),
        ({"legacy_xa_rollback_at_disconnect": "ON"}, "lost_at_disconnect", Severity.CRITICAL),
        ({"wsrep_on": "ON"}, "galera", Severity.CRITICAL),
        ({"innodb_doublewrite": "OFF"}, "torn_pages", Severity.WARNING),
        ({"read_only": "ON"}, "read_only", Severity.WARNING),
    ],
)
def test_dangerous_settings_of_mariadb(settings, code, severity):
    facts = MariaDbFacts(
        where="db", settings={**MARIADB, **settings}, prepared=[OURS], transactions=[trx(1, age_s=1.0)]
    )
    report = Report()
    mariadb.judge(facts, report, cluster="shop", known={}, limit_s=60)
    assert [(each.code, each.severity) for each in report.findings] == [(code, severity)]


async def test_a_mariadb_that_does_not_answer_was_not_seen_and_its_dsn_is_not_repeated():
    for dsn in ("nonsense://ann:secret@x", "mariadb://ann:secret@127.0.0.1:1/x"):
        facts = await mariadb.look("db", dsn)
        assert facts.trouble
        assert "secret" not in facts.trouble
        report = Report()
        mariadb.judge(facts, report, cluster="shop", known={}, limit_s=60)
        assert report.status is Status.NOT_SEEN


# ------------------------------------------------------------------------------------------------ the command


def test_a_local_cluster_s_own_files_are_found_and_others_are_taken_as_named(tmp_path):
    write_running(tmp_path, Running(cluster="c", ca=str(tmp_path / "tls" / "ca.pem")))
    (tmp_path / "tls").mkdir()
    (tmp_path / "tls" / "participant-token").write_text("t")
    asked = parser().parse_args(["doctor", "--data", str(tmp_path)])
    assert participant_access(asked) == (tmp_path / "tls" / "participant-token", tmp_path / "tls" / "ca.pem")
    named = ["--participant-token-file", "mine", "--participant-ca", "theirs"]
    asked = parser().parse_args(["doctor", "--data", str(tmp_path), *named])
    assert participant_access(asked) == (Path("mine"), Path("theirs"))
    asked = parser().parse_args(["doctor", "--url", "http://n1", "--data", str(tmp_path)])
    assert participant_access(asked) == (None, None), "of another cluster nothing is known"
