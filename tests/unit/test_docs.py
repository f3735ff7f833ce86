"""What the documents tell people to type is understood, and the README's code runs."""

import ast
import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from cluster.cli import parser
from coordinator.config import Limits, Timing
from coordinator.protocol.messages import Commit, Prepare, Prepared, Refused, Stamp
from participants.manager import Envelope
from participants.mariadb import MariaDbSettings
from participants.prepared import PreparedSettings
from participants.server import run
from participants.settings import ServerSettings
from participants.sqlite import SqliteManager

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(text, language=""):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands():
    """Every whole `outlast` command, in blocks of code and within sentences."""
    for document in DOCUMENTS:
        text = document.read_text()
        lines = [line for block in blocks(text) for line in block.replace("\\\n", " ").splitlines()]
        inline = re.findall(r"`(outlast [^`]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))
        # `outlast certs` within a sentence is a name, not a command.
        whole = [" ".join(each.split()) for each in inline if len(each.split()) > 2]
        for line in [*lines, *whole]:
            if line.startswith("outlast ") and not re.search(r"\.\.\.|\[|\||\bCOMMAND\b", line):
                yield pytest.param(line, id=f"{document.name}: {line[:60]}")


@pytest.mark.parametrize("line", list(commands()))
def test_commands_are_understood(line):
    words = shlex.split(line, comments=True)
    arguments = parser().parse_args(words[1 : words.index("&") if words[-1] == "&" else None])
    assert arguments.run


def test_the_documents_hold_commands():
    assert len(list(commands())) > 20


async def test_the_readme_s_participant_takes_part(tmp_path, monkeypatch):
    """Its code as it stands; only the port is not listened on."""
    (code,) = [block for block in blocks((ROOT / "README.md").read_text(), "python") if "@operations" in block]
    served = []
    monkeypatch.setattr(f"{run.__module__}.run", lambda manager, **kwargs: served.append((manager, kwargs)))
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    ((manager, settings),) = served
    assert isinstance(manager, SqliteManager)
    assert settings["settings"].coordinators, "else nobody is asked about branches in doubt"
    await manager.open()
    payload = b'{"op":"reserve","sku":"tea","quantity":1}'
    messages = [Prepare(gid="shop-1-1", branch="b", payload=payload), Commit(gid="shop-1-1", branch="b")]
    answers = [(await manager.handle([Envelope(each, Stamp(epoch=1))]))[0] for each in messages]
    assert answers[0] == Prepared(gid="shop-1-1", branch="b")
    more = Prepare(gid="shop-1-2", branch="b", payload=payload.replace(b"1", b"10000"))
    (refused,) = await manager.handle([Envelope(more, Stamp(epoch=1))])
    assert refused == Refused(gid="shop-1-2", branch="b", reason="out_of_stock")
    await manager.close()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_code_is_python(document):
    for block in blocks(document.read_text(), "python"):
        compile(block, str(document), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


UNITS = {"": 1, " KiB": 1 << 10, " MiB": 1 << 20, " GiB": 1 << 30}


def documented(document, heading):
    """Settings and their defaults, by the tables below a heading; as far as these are numbers."""
    (section,) = re.findall(rf"^[^\n]*{re.escape(heading)}.*?(?=^#|\Z)", document, re.MULTILINE | re.DOTALL)
    found = {}
    for names, defaults in re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| ([^|]+) \|", section, re.MULTILINE):
        figures = re.findall(r"(\d[\d,]*(?:\.\d+)?)((?: [KMG]iB)?)(?:, |$)", defaults)
        assert len(figures) == names.count(",") + 1, (names, defaults)
        for name, (digits, unit) in zip(re.findall(r"\w+", names), figures, strict=True):
            assert name not in found
            found[name] = float(digits.replace(",", "")) * UNITS[unit]
    return found


def defaults_of(kind):
    return {field.name: field.default for field in dataclasses.fields(kind)}


@pytest.mark.parametrize(
    ("kind", "heading"),
    [
        (Limits, "## `[limits]`"),
        (Timing, "## `[timing]`"),
        (MariaDbSettings, "## Participants on PostgreSQL and MariaDB"),
    ],
)
def test_every_setting_is_documented_with_its_default(kind, heading):
    """`MariaDbSettings` has all of `PreparedSettings`, which stand before its own."""
    text = (ROOT / "docs" / "CONFIGURATION.md").read_text()
    assert documented(text, heading) == defaults_of(kind)


def test_the_settings_of_a_participant_s_server_are_as_documented():
    found = documented((ROOT / "docs" / "PARTICIPANTS.md").read_text(), "Our own server has bounds")
    assert len(found) > 5
    assert found == {name: value for name, value in defaults_of(ServerSettings).items() if name in found}


@pytest.mark.parametrize(
    ("document", "settings", "most"),
    [
        ("MARIADB.md", MariaDbSettings(), MariaDbSettings().connections),
        (
            "POSTGRESQL.md",
            PreparedSettings(),
            PreparedSettings().work_connections + PreparedSettings().finish_connections,
        ),
    ],
)
def test_connections_are_counted_as_the_code_counts_them(document, settings, most):
    (line,) = re.findall(r"^\| `max_connections` \| .*$", (ROOT / "docs" / document).read_text(), re.MULTILINE)
    assert str(most) in re.findall(r"\d+", line), most
    for name, figure in re.findall(r"`(\w+_connections)` \((\d+)\)", line):
        assert getattr(settings, name) == int(figure), name
