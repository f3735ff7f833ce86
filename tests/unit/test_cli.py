"""The command line: what it refuses, how it says so, and with which exit status. Nothing is started here."""

import io
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from cluster.calls import Caller, NotConnected, Unreachable
from cluster.cli import main, parser
from cluster.commands import local
from cluster.commands.tx import wait_for
from cluster.layout import Running
from cluster.process import Identity


def usage_error(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What argparse says; it exits by itself, with status 2."""
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    return capsys.readouterr().err


def complaint(capsys: pytest.CaptureFixture[str], status: int, *words: object) -> str:
    """The one line on stderr of a command that failed with `status`."""
    assert main([str(word) for word in words]) == status
    captured = capsys.readouterr()
    assert captured.err.startswith("outlast: ")
    assert captured.err.count("\n") == 1
    return captured.err


# ------------------------------------------------------------------------------------------------ wrong usage


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "required: COMMAND"),
        (["destroy"], "invalid choice: 'destroy'"),
        (["up", "--nodes", "2"], "not an odd number"),
        (["up", "--nodes", "0"], "not a positive number"),
        (["up", "--port", "70000"], "not a port"),
        (["up", "--port", "80"], "not a port from 1024"),
        (["kill"], "required: leader|NAME"),
        (["node"], "required: --config"),
        (["participant", "oracle"], "invalid choice: 'oracle'"),
        (["participant", "null", "--port", "x"], "x is not a port"),
        (["tx"], "required: ACTION"),
        (["tx", "submit", "--timeout", "-1"], "not a positive number"),
        (["tx", "submit", "--timeout", "soon"], "soon is not a number"),
        (["tx", "submit", "--wait", "forever"], "invalid choice: 'forever'"),
        (["tx", "list", "--limit", "0"], "not a positive number"),
        (["tx", "list", "--state", "odd"], "invalid choice: 'odd'"),
        (["demo", "--seconds", "0"], "not a positive number"),
    ],
)
def test_wrong_usage(capsys: pytest.CaptureFixture[str], words: list[str], says: str) -> None:
    assert says in usage_error(capsys, *words)


@pytest.mark.parametrize(
    ("timeout_s", "wait_s"),
    [(3, 5.0), (86_400.0, 86_402.0), (7 * 86_400, 86_402.0), (10**400, 86_402.0), (0, 12.0), (-1, 12.0), ("3", 12.0)],
)
def test_a_submission_waits_for_its_timeout_and_never_longer_than_a_day(timeout_s: object, wait_s: float) -> None:
    assert wait_for(timeout_s) == wait_s


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["tx", "submit"], "--branch PARTICIPANT=JSON"),
        (["tx", "submit", "--branch", "a={}", "--file", "-"], "either --branch"),
        (["tx", "submit", "--branch", "inventory"], "not PARTICIPANT=JSON"),
        (["tx", "submit", "--branch", "a={"], "not JSON"),
        (["tx", "submit", "--file", "/nowhere/x.json"], "cannot be read"),
        (["tx", "list", "--token-file", "/nowhere/token"], "cannot be read"),
    ],
)
def test_a_request_that_cannot_be_made(capsys: pytest.CaptureFixture[str], words: list[str], says: str) -> None:
    assert says in complaint(capsys, 2, *words, "--url", "http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["null", "--name", "a"], "--register and --name go together"),
        (["null", "--name", "A b", "--register", "http://127.0.0.1:9"], "lower-case"),
        (["null", "--file", "x.db"], "holds nothing"),
        (["null", "--coordinator", "nonsense"], "must be an http URL"),
        (["sqlite"], "needs --operations"),
        (["sqlite", "--operations", "a:b", "--file", "/nowhere/x.db"], "No module named 'a'"),
        (["sqlite", "--operations", "json", "--file", "x.db"], "not MODULE:NAME"),
        (["sqlite", "--operations", "json:nothing", "--file", "x.db"], "no attribute 'nothing'"),
        (["sqlite", "--operations", "json:dumps", "--file", "x.db"], "not participants.operations.Operations"),
        (
            ["sqlite", "--operations", "a:b", "--file", "x.db", "--dsn", "mariadb://db/a"],
            "are for postgres and mariadb",
        ),
        (["mariadb"], "mariadb needs --operations MODULE:NAME and its DSN"),
        (["mariadb", "--operations", "a:b", "--file", "x.db"], "--file and --schema are for sqlite"),
        (["mariadb", "--operations", "a:b", "--dsn", "mariadb://ann:secret@db/a"], "use --dsn-file"),
        (["mariadb", "--operations", "a:b", "--db-schema", "x", "--dsn", "mariadb://db/a"], "is for postgres"),
        (["mariadb", "--operations", "tests.support.transfers:on_mariadb", "--dsn", "nonsense"], "mariadb://user"),
        (["postgres", "--operations", "a:b", "--leave-alone", "t", "--dsn", "postgresql://db/a"], "is for mariadb"),
    ],
)
def test_a_participant_that_cannot_be_served(capsys: pytest.CaptureFixture[str], words: list[str], says: str) -> None:
    assert says in complaint(capsys, 2, "participant", *words)


def test_a_wrong_configuration(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "cannot be read" in complaint(capsys, 2, "node", "--config", tmp_path / "none.toml")
    (tmp_path / "n1.toml").write_text("cluster = 7")
    assert "n1.toml" in complaint(capsys, 2, "node", "--config", tmp_path / "n1.toml")


# ------------------------------------------------------------------------------------------------ expected failures


@pytest.mark.parametrize(
    "words", [["status"], ["kill", "leader"], ["start", "n1"], ["down"], ["tx", "list"], ["tx", "show", "c-1-1"]]
)
def test_no_cluster(capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[str]) -> None:
    assert "there is no cluster in" in complaint(capsys, 1, *words, "--data", tmp_path)


def test_a_folder_that_is_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "c").write_text("")
    for words in (["status"], ["up", "--json"]):
        assert "--data" in complaint(capsys, 1, *words, "--data", tmp_path / "c")


def test_a_damaged_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "cluster.json").write_text('{"nodes": 3}')
    assert "damaged" in complaint(capsys, 1, "status", "--data", tmp_path)
    (tmp_path / "cluster.json").unlink()
    (tmp_path / "n1").mkdir()
    (tmp_path / "n1" / "node.toml").write_text("nonsense")
    assert "repair it" in complaint(capsys, 1, "up", "--json", "--data", tmp_path)


def test_nobody_answers(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.commands.tx._PATIENCE_S", 0.05)
    monkeypatch.setattr("cluster.commands.tx._MARGIN_S", 0.05)
    # Nobody was connected with, so it is certain that nothing was done.
    for words in (["list"], ["submit", "--branch", "a={}", "--timeout", "0.01"]):
        said = complaint(capsys, 1, "tx", *words, "--url", "http://127.0.0.1:9", "--url", "http://127.0.0.1:10")
        assert "it was not done: " in said
        assert "cannot be reached" in said


@pytest.mark.parametrize(
    "url",
    [
        *("nonsense", "127.0.0.1:7400", "ftp://127.0.0.1", "http://", "http://[::1", "http://a:b", "http://a:99999"),
        *("http://a:0", "http://a/?b=c", "http://a b", "http://a/#b", ""),
    ],
)
@pytest.mark.parametrize("words", [["list"], ["show", "c-1-1"], ["abort", "c-1-1"], ["submit", "--branch", "a={}"]])
def test_a_url_that_is_none(capsys: pytest.CaptureFixture[str], words: list[str], url: str) -> None:
    said = complaint(capsys, 2, "tx", *words, "--url", "http://127.0.0.1:9", "--url", url)
    assert f"--url {url} is not a node's URL" in said


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("outlast 0.")
    for words in (["--help"], ["up", "--help"], ["tx", "submit", "--help"]):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 0
        assert "outlast" in capsys.readouterr().out


def test_every_command_names_a_function_that_exists() -> None:
    import importlib

    def runs(of: Any) -> list[str]:
        found = [of.get_default("run")] if of.get_default("run") else []
        for action in of._actions:
            if isinstance(action.choices, dict):
                found += [run for choice in action.choices.values() for run in runs(choice)]
        return found

    found = runs(parser())
    assert len(found) >= 14
    for run in found:
        module, _, function = run.partition(":")
        assert callable(getattr(importlib.import_module(f"cluster.commands.{module}"), function))


# ------------------------------------------------------------------------------------------------ tx, against a fake


TXN: dict[str, Any] = {
    "gid": "c-1-1",
    "state": "committing",
    "decision": "commit",
    "reason": None,
    "epoch": 1,
    "branches": [{"branch": "a", "participant": "a", "state": "committing", "reason": None, "result": 7}],
    "started_at": "2026-01-01T00:00:00.000Z",
    "decided_at": "2026-01-01T00:00:00.010Z",
    "ended_at": None,
}
ABORTED = TXN | {
    "state": "aborting",
    "decision": "abort",
    "branches": [{"branch": "a", "participant": "a", "state": "refused", "reason": "out_of_stock"}],
}
ACTIVE = TXN | {
    "state": "active",
    "decision": None,
    "decided_at": None,
    "branches": [{"branch": "a", "participant": "a", "state": "active", "reason": None}],
}
UNDECIDED = TXN | {"state": "preparing", "decision": None, "decided_at": None}


class FakeNode:
    """Answers with what it was given, in turn, and keeps what it was asked."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, Any]] = []
        self.asked: list[tuple[str, str, dict[str, str], Any]] = []

    async def handle(self, request: web.Request) -> web.Response:
        body = await request.read()
        self.asked.append((request.method, request.path_qs, dict(request.headers), json.loads(body) if body else None))
        status, answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return web.json_response(answer, status=status, headers={"Retry-After": "0"} if status == 503 else {})


@pytest.fixture
async def fake() -> AsyncIterator[tuple[FakeNode, str]]:
    node = FakeNode()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", node.handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield node, f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


Tx = Callable[..., Any]


@pytest.fixture
def tx(fake: tuple[FakeNode, str], capsys: pytest.CaptureFixture[str]) -> Tx:
    """Runs `outlast tx ...` against the fake, on a thread: the command has an event loop of its own."""
    import asyncio

    async def run(*words: str) -> tuple[int, str, str]:
        status = await asyncio.to_thread(main, ["tx", *words, "--url", fake[1]])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.mark.parametrize(
    ("answer", "words", "status", "says"),
    [
        ((200, TXN), [], 0, ""),
        ((200, ABORTED), [], 1, "c-1-1 aborted: a: out_of_stock"),
        ((202, UNDECIDED), [], 3, "still preparing"),
        ((200, UNDECIDED), ["--wait", "none"], 0, ""),
        ((202, TXN), ["--wait", "ended"], 3, "still committing"),
        ((422, {"title": "Invalid", "detail": "participant 'a' is not registered"}), [], 1, "'a' is not registered"),
        ((500, "oops"), [], 1, "status 500"),
    ],
)
async def test_submit(
    fake: tuple[FakeNode, str], tx: Tx, answer: tuple[int, Any], words: list[str], status: int, says: str
) -> None:
    fake[0].answers = [answer]
    got, _, stderr = await tx("submit", "--branch", 'a={"n":1}', *words)
    assert got == status
    assert says in stderr
    assert "Traceback" not in stderr


async def test_submit_sends_what_it_was_told(fake: tuple[FakeNode, str], tx: Tx) -> None:
    # A node that has no leader yet is asked again, under the same key.
    fake[0].answers = [(503, {"detail": "no leader"}), (200, TXN)]
    words = ["--branch", 'a={"n":1}', "--branch", "b=null", "--key", "k", "--timeout", "3", "--wait", "ended", "--json"]
    status, stdout, _ = await tx("submit", *words)
    assert status == 0
    assert json.loads(stdout) == TXN
    assert len(fake[0].asked) == 2
    for method, path, headers, body in fake[0].asked:
        assert (method, path, headers["Idempotency-Key"]) == ("POST", "/v1/transactions", "k")
        assert body == {
            "branches": [{"participant": "a", "payload": {"n": 1}}, {"participant": "b", "payload": None}],
            "timeout_s": 3.0,
            "wait": "ended",
        }


async def test_submit_reads_stdin(fake: tuple[FakeNode, str], tx: Tx, monkeypatch: pytest.MonkeyPatch) -> None:
    fake[0].answers = [(200, TXN)]
    monkeypatch.setattr("sys.stdin", io.StringIO('{"branches": []}'))
    assert (await tx("submit", "--file", "-"))[0] == 0
    assert fake[0].asked[0][3] == {"branches": []}
    for text in ("[]", "{"):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        assert (await tx("submit", "--file", "-"))[0] == 2


async def test_show_list_abort(fake: tuple[FakeNode, str], tx: Tx) -> None:
    fake[0].answers = [(200, TXN)]
    status, stdout, _ = await tx("show", "c-1-1", "--wait", "decided")
    assert status == 0
    assert "c-1-1  committing" in stdout
    assert "a                    committing  7" in stdout
    status, _, stderr = await tx("abort", "c-1-1")
    assert status == 1
    assert "had been decided already" in stderr
    fake[0].answers = [(200, ABORTED)]
    assert (await tx("abort", "c-1-1"))[0] == 0
    fake[0].answers = [(200, {"transactions": [TXN], "next": "c-1-0"})]
    status, stdout, _ = await tx("list", "--state", "committing", "--limit", "1")
    assert status == 0
    assert stdout.startswith("c-1-1 ")
    assert stdout.endswith("--after c-1-0\n")
    assert [path for _, path, _, _ in fake[0].asked] == [
        "/v1/transactions/c-1-1?wait=decided",
        "/v1/transactions/c-1-1/abort",
        "/v1/transactions/c-1-1/abort",
        "/v1/transactions?state=committing&limit=1",
    ]


async def test_list_goes_on_after_short_pages(
    fake: tuple[FakeNode, str], tx: Tx, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = [([], "c-1-9"), ([TXN], "c-1-5"), ([TXN, TXN], "c-1-2"), ([], None)]
    fake[0].answers = [(200, {"transactions": rows, "next": after}) for rows, after in pages]
    status, stdout, _ = await tx("list", "--state", "committing", "--limit", "3", "--json")
    assert (status, json.loads(stdout)) == (0, {"transactions": [TXN] * 3, "next": "c-1-2"})
    assert [path.partition("?")[2] for _, path, _, _ in fake[0].asked] == [
        "state=committing&limit=3",
        "state=committing&after=c-1-9&limit=3",
        "state=committing&after=c-1-5&limit=2",
    ]
    status, stdout, _ = await tx("list")
    assert (status, stdout) == (0, "")
    fake[0].answers = [(200, {"transactions": [ACTIVE], "next": None})]
    status, stdout, _ = await tx("list", "--state", "active")
    assert status == 0
    assert "c-1-1                active" in stdout
    assert stdout.endswith("a active\n")
    # However many follow, it ends, and says where to go on.
    monkeypatch.setattr("cluster.commands.tx._PAGES_MAX", 4)
    fake[0].asked, fake[0].answers = [], [(200, {"transactions": [], "next": "c-1-1"})]
    status, stdout, _ = await tx("list", "--state", "aborted")
    assert (status, stdout, len(fake[0].asked)) == (0, "more: --after c-1-1\n", 4)
    # A page that is refused is no end of the list.
    fake[0].answers = [(200, {"transactions": [TXN], "next": "c-1-1"}), (422, {"detail": "no such gid"})]
    status, stdout, stderr = await tx("list")
    assert (status, stdout) == (1, "")
    assert "no such gid" in stderr


async def test_a_token_is_shown(fake: tuple[FakeNode, str], tx: Tx, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("sesame-sesame-16\n")
    fake[0].answers = [(200, {"transactions": []})]
    assert (await tx("list", "--token-file", str(tmp_path / "token")))[0] == 0
    assert fake[0].asked[0][2]["Authorization"] == "Bearer sesame-sesame-16"


# ------------------------------------------------------------------------------------------------ calls


async def test_a_call_goes_round_the_nodes(fake: tuple[FakeNode, str]) -> None:
    fake[0].answers = [(200, "here")]
    async with Caller(["http://127.0.0.1:9", fake[1]]) as caller:
        assert (await caller.anywhere("GET", "/x", within_s=10)).body == "here"
        with pytest.raises(Unreachable):
            await caller.once("GET", "http://127.0.0.1:9/x", within_s=1)
    async with Caller(["http://127.0.0.1:9"]) as caller:
        with pytest.raises(NotConnected, match="cannot be reached"):
            await caller.anywhere("GET", "/x", within_s=0.05)
    async with Caller([]) as caller:
        with pytest.raises(Unreachable, match="no node"):
            await caller.anywhere("GET", "/x", within_s=0.05)


async def test_who_was_heard_of_may_have_done_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last try could not connect; an earlier one lost its connection, and with it what became of the request."""
    tries: list[str] = []

    async def once(self: Caller, method: str, url: str, **_: Any) -> Any:
        tries.append(url)
        raise Unreachable("lost") if len(tries) == 1 else NotConnected(f"{url} cannot be reached")

    monkeypatch.setattr(Caller, "once", once)
    async with Caller(["http://127.0.0.1:9"]) as caller:
        with pytest.raises(Unreachable, match="cannot be reached") as caught:
            await caller.anywhere("POST", "/x", within_s=0.2)
    assert len(tries) > 1
    assert not isinstance(caught.value, NotConnected)


async def test_the_last_answer_counts_when_time_is_up(fake: tuple[FakeNode, str]) -> None:
    fake[0].answers = [(503, {"detail": "no leader"})]
    async with Caller([fake[1]]) as caller:
        answer = await caller.anywhere("GET", "/x", within_s=0.05)
    assert (answer.status, answer.trouble) == (503, "no leader")


# ------------------------------------------------------------------------------------------------ keeping watch


async def test_a_node_that_ended_before_anybody_watched_is_told_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Started:
        nodes, running, services = ("n1", "n2", "n3"), ("n1", "n2"), dict[str, Any]()
        looks = 0

        async def note_deaths(self) -> Running:
            self.looks += 1
            return Running(cluster="c", owner=Identity.mine(), down=self.looks > 1)

    monkeypatch.setattr(local, "_LOOK_S", 0.0)
    await local._keep(Started())
    assert "n3 has ended; start it again with `outlast start n3`" in capsys.readouterr().err
