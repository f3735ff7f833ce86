"""Files that are named on the command line, whatever they hold: a status, and one line that says what is wrong.

Payloads, tokens, schemas, copies, and what is left of a node: commands run in this process, up to where they would
speak to a node.
"""

import contextlib
import io
import json
import random
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cluster import cli, recovery
from cluster.calls import Answer, Caller
from cluster.cli import main, parser
from cluster.commands import copies, doctor, serve, tx
from cluster.process import ProcessTrouble
from cluster.replication import standing
from cluster.replication.journal import DurableJournal
from cluster.replication.offline import read_committed
from cluster.replication.snapshot import Snapshots
from coordinator.codec import Malformed
from coordinator.commands import decode_command, encode_command
from coordinator.copies import CopyBroken, CopyHeader, CopyReader
from tests.fuzz import HUNT, examples
from tests.fuzz.lives import CLUSTER, LIFE, PLAIN, ledger_after
from tests.fuzz.mutations import altered, as_json, damaged, pack
from tests.fuzz.test_states import RESEALED, WHOLE
from tests.simulation.disk import SimulatedDisk
from tests.simulation.journal import JOURNAL_ID, SMALL

NODE = "http://127.0.0.1:1"


class _Asked(Caller):
    """Says no to all that would be said to a node."""

    async def once(self, method: str, url: str, *, body: object = None, **_: Any) -> Answer:
        json.dumps(body).encode()
        return Answer(404, {"detail": "there is nobody here"})

    async def upload(self, url: str, parts: Any, *, size: int, **_: Any) -> Answer:
        assert sum(map(len, parts)) == size
        return Answer(404, {"detail": "there is nobody here"})


@pytest.fixture(autouse=True)
def nobody_to_speak_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "parser", cache(parser))  # made anew for each command it would take most of the time
    monkeypatch.setattr(tx, "Caller", _Asked)


def runs(*words: object) -> tuple[int, str]:
    """One command; its status and what it printed."""
    # As strict as a terminal is: a lone surrogate cannot be printed.
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", errors) for errors in ("strict", "backslashreplace"))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(word) for word in words])
    said = []
    for stream in (out, err):
        stream.flush()
        said.append(stream.buffer.getvalue().decode())  # type: ignore[attr-defined]
    assert status in (0, 1, 2, 3)
    if status:
        assert said[1].startswith("outlast: ")
        assert len(said[1]) < 3000
        assert said[1].count("\n") == 1, "one line"
    else:
        assert not said[1]
    return status, said[0]


@contextlib.contextmanager
def file_with(content: bytes) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        path.touch(mode=0o600)
        path.write_bytes(content)
        yield path


# ------------------------------------------------------------------------------------------------ payloads

BODY = {
    "protocol": "2pc",
    "branches": [{"participant": "stock", "payload": {"op": "take", "n": 1}}],
    "timeout_s": 5,
    "wait": "none",
}
BODIES = damaged(st.just(json.dumps(BODY).encode())) | altered(st.just(BODY)).map(as_json)


def submits(content: bytes) -> None:
    with file_with(content) as file:
        assert runs("tx", "submit", "--url", NODE, "--file", file)[0] in (1, 2)


@examples(60)
@given(BODIES)
@example(b"[" * 2000)
@example(b'{"timeout_s":' + b"9" * 5000 + b"}")
@example(b'{"timeout_s":' + b"9" * 4000 + b"}")
@example(b'{"timeout_s":1e999,"wait":NaN}')
@example(b" " * (20 << 20))
def test_a_body_in_a_file_is_sent_or_refused(content: bytes) -> None:
    submits(content)


@pytest.mark.parametrize("payload", ["[" * 2000, "9" * 5000, "\ud800", "{"])
def test_a_payload_among_the_words_is_sent_or_refused(payload: str) -> None:
    assert runs("tx", "submit", "--url", NODE, "--branch", f"stock={payload}")[0] == 2


# ------------------------------------------------------------------------------------------------ tokens, names, SQL

TOKENS = damaged(st.just(b"token-0123456789\nolder-token-0123456789\n"))


def read_token(content: bytes, read: Callable[[Path], str | None] = tx.read_token) -> None:
    with file_with(content) as file:
        try:
            token = read(file)
        except tx.Usage as error:
            assert str(file) in str(error)
            assert len(str(error)) < len(str(file)) + 60, "and not what is in it"
            return
        assert token is not None
        assert token.isascii()
        assert token.isprintable()


@examples(60)
@given(TOKENS)
@example(b"tok\x01en-0123456789")
@example(b"\0")
def test_a_file_of_tokens_holds_one_that_can_be_shown(content: bytes) -> None:
    read_token(content)
    with file_with(content) as file:
        assert runs("tx", "list", "--url", NODE, "--token-file", file)[0] in (1, 2)


@examples(30)
@given(damaged(st.just(b"postgresql://user:secret-word@127.0.0.1:1/shop\n")))
def test_a_file_that_names_a_database_is_read_or_refused(content: bytes) -> None:
    with file_with(content) as file:
        try:
            doctor._dsn(str(file))
        except tx.Usage as error:
            assert "secret-word" not in str(error)


@examples(30)
@given(damaged(st.just("CREATE TABLE größe (id INTEGER)".encode())))
@example(b"\xff")
def test_a_schema_is_read_or_refused(content: bytes) -> None:
    with file_with(content) as file:
        words = ["participant", "sqlite", "--operations", "participants.shop.inventory:operations"]
        arguments = parser().parse_args([*words, "--file", str(file) + ".db", "--schema", str(file)])
        try:
            serve._sqlite(arguments)
        except serve._Usage as error:
            assert str(file) in str(error)


# ------------------------------------------------------------------------------------------------ copies


def _resealed_header(**changes: Any) -> bytes:
    """A copy whose header says something else, under a checksum that fits."""
    (length,) = struct.unpack_from("<I", WHOLE, 13)
    header = {**msgpack.unpackb(WHOLE[17 : 17 + length]), **changes}
    payload = msgpack.packb(header, unicode_errors="surrogatepass")
    head = struct.pack("<cI", b"H", len(payload))
    return WHOLE[:12] + head + payload + struct.pack("<I", zlib.crc32(head + payload)) + WHOLE[17 + length + 4 :]


COPIES = st.tuples(damaged(st.just(WHOLE)), st.just(False)) | st.tuples(RESEALED, st.just(True))


def verifies(content: bytes, *, resealed: bool) -> None:
    with file_with(content) as file:
        status, said = runs("backup", "--verify", file, "--json")
        if status == 0:
            assert json.loads(said)["bytes"] == len(content)
            assert resealed or content == WHOLE, "damage is noticed"
        assert runs("backup", "--verify", file)[0] == status
        assert runs("restore", file, "--url", NODE)[0] == 1


@examples(60)
@given(COPIES)
@example((_resealed_header(made_at=2**62), True))
@example((_resealed_header(made_at=-(2**62)), True))
@example((_resealed_header(cluster="x\nrm -rf \x1b[2J"), True))
@example((_resealed_header(epoch=-1), True))
@example((_resealed_header(newest="\0"), True))
def test_a_copy_is_shown_and_sent_or_refused(copy: tuple[bytes, bool]) -> None:
    verifies(copy[0], resealed=copy[1])


# ------------------------------------------------------------------------------------------------ what a node has left

TOML = f"""cluster = "{CLUSTER}"
node = "n1"
data = "data"
secret = "0123456789abcdef"
generation = 2
nodes = [
  {{ id = "n1", api = "127.0.0.1:7001", raft = "127.0.0.1:8001" }},
  {{ id = "n2", api = "127.0.0.1:7002", raft = "127.0.0.1:8002" }},
  {{ id = "n3", api = "127.0.0.1:7003", raft = "127.0.0.1:8003" }},
]
"""
SNAPSHOT_AT = 8


def _folder(commands: list[bytes], pieces: list[bytes]) -> dict[str, bytes]:
    """What a node's folder holds that has applied these commands, and kept a snapshot of the first of them."""
    disk = SimulatedDisk(random.Random(1))
    journal = DurableJournal(disk, SMALL, new_id=lambda: JOURNAL_ID)
    for index, command in enumerate(commands, 1):
        journal.append(b"\0" + command, index, 1)
    journal.note_commit(len(commands))
    journal.sync_now()
    if pieces:
        Snapshots(disk).write(SNAPSHOT_AT, 1, pieces)
        journal.move_base(SNAPSHOT_AT - 2)
        journal.sync_now()
    journal.close()
    standing.store(disk, standing.Marker(node="n1", voter=True))
    return {"generation": b"1\n", **{f"log/{name}": disk.content(name) for name in disk.names()}}


COMMANDS = [encode_command(header, entries) for header, entries in LIFE]
PIECES = list(ledger_after("life", SNAPSHOT_AT).snapshot()())


def _strange_row() -> list[bytes]:
    """A snapshot, under checksums that fit, with an ended transaction that has no list of branches."""
    *others, rows = PIECES
    plain = msgpack.unpackb(rows)
    at = next(index for index, row in enumerate(plain) if isinstance(row[1], bytes))
    plain[at][1] = pack([*msgpack.unpackb(plain[at][1])[:-1], None])
    return [*others, pack(plain)]


@cache
def _good(with_snapshot: bool) -> dict[str, bytes]:
    return _folder(COMMANDS, PIECES if with_snapshot else [])


@st.composite
def folders(draw: st.DrawFn) -> dict[str, bytes]:
    """Damage in one of its files, or in what a command or a snapshot says."""
    match draw(st.integers(0, 2)):
        case 0:
            at = draw(st.integers(0, len(COMMANDS) - 1))
            bad = draw(altered(st.just(PLAIN[at])).map(pack) | damaged(st.just(COMMANDS[at])))
            return _folder([*COMMANDS[:at], bad or b"\x90", *COMMANDS[at + 1 :]], [])
        case 1:
            at = draw(st.integers(0, len(PIECES) - 1))
            bad = draw(altered(st.just(msgpack.unpackb(PIECES[at]))).map(pack) | damaged(st.just(PIECES[at])))
            return _folder(COMMANDS, [*PIECES[:at], bad or b"\x90", *PIECES[at + 1 :]])
        case _:
            files = _good(draw(st.booleans()))
            name = draw(st.sampled_from(sorted(files)))
            return {**files, name: draw(damaged(st.just(files[name].rstrip(b"\0"))))}


def recovers(files: dict[str, bytes]) -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "node.toml").write_text(TOML)
        for file, content in files.items():
            path = folder / "data" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        status, said = runs("recover", "--config", folder / "node.toml", "--force", "--json")
        if status == 0:
            assert runs("backup", "--verify", json.loads(said)["copy"])[0] == 0
        return status


@examples(40)
@given(folders())
@example({**_good(False), "generation": b"1" * 5000})
@example({**_good(False), "generation": "٣".encode()})
@example({**_good(False), "log/standing": b"[" * 3000})
@example(_folder(COMMANDS, _strange_row()))
def test_what_is_left_of_a_node_is_recovered_or_refused(files: dict[str, bytes]) -> None:
    recovers(files)


@pytest.mark.parametrize("data", ["[" * 300, "node.toml/data"])
def test_a_folder_that_cannot_be_is_said_to_be_none(data: str, tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    file.write_text(TOML.replace('"data"', f'"{data}"'))
    assert runs("recover", "--config", file, "--force")[0] == 1
    words = [sys.executable, "-m", "coordinator", "--config", str(file)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "cannot be made" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_undamaged_are_taken() -> None:
    with file_with(json.dumps(BODY).encode()) as file:
        assert runs("tx", "submit", "--url", NODE, "--file", file)[0] == 1, "nobody is there to take it"
    with file_with(WHOLE) as file:
        assert runs("backup", "--verify", file)[0] == 0
    assert recovers({**_good(False)}) == recovers({**_good(True)}) == 0


# ------------------------------------------------------------------------------------------------ known to be bad


def _body_as_it_is(file: str) -> Any:
    """What is in the file is JSON."""
    return json.loads(Path(file).read_text())


def _one_error(file: str) -> Any:
    """What is wrong with a file of JSON is its JSON."""
    try:
        return json.loads(Path(file).read_text())
    except json.JSONDecodeError as error:
        raise tx.Usage(f"{file} is not JSON") from error


@pytest.mark.parametrize("read", [_body_as_it_is, _one_error])
def test_a_careless_reader_of_bodies_is_found(read: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tx, "_read", read)

    @HUNT
    @given(BODIES)
    def hunt(content: bytes) -> None:
        submits(content)

    with pytest.raises((ValueError, TypeError, AttributeError)):
        hunt()


def _first_word(file: Path | None) -> str | None:
    """There is one."""
    return None if file is None else file.read_text("ascii").split()[0]


def _any_word(file: Path | None) -> str | None:
    """Whatever can be read can be shown."""
    assert file is not None
    words = file.read_text("latin-1").split()
    if not words:
        raise tx.Usage(f"{file} holds no token")
    return words[0]


@pytest.mark.parametrize(
    ("read", "error"), [(_first_word, (UnicodeDecodeError, IndexError)), (_any_word, AssertionError)]
)
def test_a_careless_reader_of_a_token_is_found(read: Callable[[Path], str | None], error: Any) -> None:
    @HUNT
    @given(TOKENS)
    def hunt(content: bytes) -> None:
        read_token(content, read)

    with pytest.raises(error):
        hunt()


def _by_its_header(file: Path) -> tuple[CopyHeader, int]:
    """A header is enough."""
    reader = CopyReader()
    with contextlib.suppress(CopyBroken):
        reader.feed(file.read_bytes())
    if reader.header is None:
        raise ProcessTrouble(f"{file} is no copy")
    return reader.header, file.stat().st_size


def _unguarded(file: Path) -> tuple[CopyHeader, int]:
    """What is verified is whole."""
    reader = CopyReader()
    reader.feed(file.read_bytes())
    return reader.end()[0], reader.size


@pytest.mark.parametrize(("read", "error"), [(_by_its_header, AssertionError), (_unguarded, CopyBroken)])
def test_a_careless_reader_of_copies_is_found(read: Any, error: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "read_copy", read)

    @HUNT
    @given(COPIES)
    def hunt(copy: tuple[bytes, bool]) -> None:
        verifies(copy[0], resealed=copy[1])

    with pytest.raises(error):
        hunt()


def _numbered(data: Path) -> int:
    """The file holds a number."""
    return int((data / "generation").read_text())


def _machine_s_own(folder: Path, machine: Any) -> Any:
    """What is committed was written by this software."""
    for command in read_committed_commands(folder):
        decode_command(command)
    return read_committed(folder, machine)


def read_committed_commands(folder: Path) -> list[bytes]:
    class Kept:
        def __init__(self) -> None:
            self.commands: list[bytes] = []

        def apply(self, command: bytes) -> None:
            self.commands.append(command)

        def restore(self, pieces: Any) -> Callable[[], None]:
            list(pieces)
            return lambda: None

    kept = Kept()
    read_committed(folder, kept)
    return kept.commands


@pytest.mark.parametrize(
    ("name", "careless", "error"),
    [("of_folder", _numbered, ValueError), ("read_committed", _machine_s_own, Malformed)],
)
def test_a_careless_recovery_is_found(name: str, careless: Any, error: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, name, careless)

    @HUNT
    @given(folders())
    def hunt(files: dict[str, bytes]) -> None:
        recovers(files)

    with pytest.raises(error):
        hunt()
