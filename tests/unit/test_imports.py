"""Who may import whom. The rules of the house, read off the source; and a bad source for every rule.

- `coordinator/protocol/` is pure: a handful of standard modules and its own files, and what records are made of.
  Protocols never import each other.
- `cluster/replication/` moves bytes: it imports nothing of ours outside itself.
- The rest of `cluster/` operates processes: it may import everything, and nothing outside imports it.
- `participants` imports only the vocabulary: the messages and the codec.
- `coordinator` never imports `participants`, and only its `__main__` names concrete implementations of the log. The
  door is none: it only lets connections in. One exception: `client_adapters`, a part of the SDK, names the modules that
  make an application's own connection a branch.
- Only `cluster/replication/raft.py` imports pysyncobj. Nobody imports pickle, or what pickles.
- Nobody imports by a name that is computed, which would get past all of this; but commands load what their users name.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.protocol.registry import PROTOCOLS

ROOT = Path(__file__).parents[2]
PACKAGES = ("coordinator", "participants", "cluster")
PURE = frozenset({"enum", "typing", "collections.abc", "functools"})
"""What is pure may be remembered: `functools` is here for its `lru_cache`."""
VOCABULARY = frozenset({"coordinator.protocol.messages", "coordinator.codec"})
ABSTRACT = frozenset({"cluster.replication.log", "cluster.replication.clock", "cluster.replication.door"})
PICKLES = frozenset({"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal"})
ADAPTERS = {
    "coordinator.client_adapters": frozenset({"participants.mariadb_application", "participants.postgres_application"})
}
IMPLEMENTATIONS = frozenset(type(protocol).__module__ for protocol in PROTOCOLS.values())


def sources() -> Iterator[tuple[str, Path]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


MODULES = dict(sources())


def imported(module: str, source: str, *, package: bool = False) -> Iterator[str]:
    """Every module that `source` imports, at the top or anywhere inside; "?" for a name that is computed."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=base, names=names, level=level):
                outer = module.split(".")[: len(module.split(".")) - level + package] if level else []
                origin = ".".join([*outer, *([base] if base else [])])
                yield from (_target(origin, alias.name) for alias in names)
            case ast.Name(id="__import__") | ast.Attribute(attr="import_module") | ast.alias(name="import_module"):
                yield "?"
            case _:
                pass


def _target(origin: str, name: str) -> str:
    # `from package import module` imports the module; `from module import thing` the module as well.
    inner = f"{origin}.{name}"
    return inner if inner in MODULES else origin


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def complaints(module: str, source: str, *, package: bool = False) -> list[str]:
    """What is wrong with the imports of `module`, in words."""
    return [
        f"{module} imports {target}: {why}"
        for target in imported(module, source, package=package)
        if (why := objection(module, target)) is not None
    ]


def objection(module: str, target: str) -> str | None:
    """Why `module` may not import `target`; None when it may."""
    ours = any(within(target, package) for package in PACKAGES)
    top = target.partition(".")[0]
    bounded = within(module, "coordinator") or within(module, "cluster.replication")
    if target == "?":
        command = module == "participants.__main__" or not (within(module, "participants") or bounded)
        return None if command else "imports are written out"
    if top in PICKLES:
        return "nobody pickles"
    if top == "pysyncobj" and module != "cluster.replication.raft":
        return "only cluster.replication.raft knows pysyncobj"
    if within(module, "coordinator.protocol"):
        if target == "re" and module == "coordinator.protocol.messages":  # how a gid is spelled
            return None
        if top == "msgspec" and module == "coordinator.protocol.record":
            return None  # what records are made of
        if target not in PURE and not within(target, "coordinator.protocol"):
            return "the core is pure"
        if target in IMPLEMENTATIONS and module != "coordinator.protocol.registry":
            return "protocols stand alone, and only the registry names them"
    if within(module, "cluster.replication") and ours and not within(target, "cluster.replication"):
        return "replication moves bytes"
    if within(target, "cluster") and not within(target, "cluster.replication") and not within(module, "cluster"):
        return "nothing imports what operates processes"
    if within(module, "participants") and ours and not within(target, "participants") and target not in VOCABULARY:
        return "participants know the vocabulary only"
    if within(module, "coordinator"):
        if within(target, "participants") and target not in ADAPTERS.get(module, ()):
            return "the coordinator knows no participant"
        concrete = within(target, "cluster.replication") and target not in ABSTRACT
        if concrete and module != "coordinator.__main__":
            return "only __main__ names concrete classes"
    return None


@pytest.mark.parametrize("module", MODULES)
def test_every_module_keeps_the_rules(module):
    path = MODULES[module]
    assert complaints(module, path.read_text(), package=path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source", "why"),
    [
        ("coordinator.protocol.two_phase", "import time", "the core is pure"),
        ("coordinator.protocol.two_phase", "import random as enum", "the core is pure"),
        ("coordinator.protocol.two_phase", "def f():\n    from asyncio import sleep", "the core is pure"),
        ("coordinator.protocol.two_phase", "import re", "the core is pure"),
        ("coordinator.protocol.two_phase", "import collections", "the core is pure"),
        ("coordinator.protocol.invariants", "from coordinator.codec import Malformed", "the core is pure"),
        ("coordinator.protocol.invariants", "from .. import ledger", "the core is pure"),
        ("coordinator.protocol.saga", "from coordinator.protocol.two_phase import TwoPhaseCommit", "stand alone"),
        ("coordinator.protocol.saga", "from coordinator.protocol import two_phase", "stand alone"),
        ("coordinator.protocol.saga", "from . import two_phase", "stand alone"),
        ("coordinator.protocol.saga", "from .two_phase import TwoPhaseCommit", "stand alone"),
        ("cluster.replication.raft", "from coordinator.ledger import Ledger", "replication moves bytes"),
        ("cluster.replication.raft", "import cluster.local", "replication moves bytes"),
        ("cluster.replication.memory", "if 1:\n    import participants", "replication moves bytes"),
        ("coordinator.driver", "from cluster.local import LocalCluster", "operates processes"),
        ("coordinator.__main__", "import cluster", "operates processes"),
        ("coordinator.__main__", "from cluster import local", "operates processes"),
        ("participants.server", "import cluster.cli", "operates processes"),
        ("participants.server", "from cluster.replication.clock import Clock", "the vocabulary only"),
        ("participants.server", "from coordinator.ledger import Ledger", "the vocabulary only"),
        ("participants.server", "from coordinator.protocol import transaction", "the vocabulary only"),
        ("participants.shop.orders", "import coordinator", "the vocabulary only"),
        ("coordinator.api", "from participants.resource import Branch", "knows no participant"),
        ("coordinator.__main__", "try:\n    import participants.null\nexcept ImportError: ...", "knows no participant"),
        ("coordinator.client", "from participants.postgres_application import Postgres", "knows no participant"),
        ("coordinator.client_adapters", "import participants.postgres", "knows no participant"),
        ("coordinator.client_adapters", "from participants import postgres_database", "knows no participant"),
        ("coordinator.driver", "from cluster.replication.raft_log import RaftLog", "only __main__"),
        ("coordinator.driver", "from cluster.replication import memory", "only __main__"),
        ("cluster.replication.transport", "from pysyncobj.transport import Transport", "knows pysyncobj"),
        ("cluster.replication.raft_log", "from pysyncobj.config import FAIL_REASON", "knows pysyncobj"),
        ("coordinator.__main__", "import pysyncobj", "knows pysyncobj"),
        ("cluster.replication.raft", "import pickle", "nobody pickles"),
        ("coordinator.codec", "from pickle import loads", "nobody pickles"),
        ("participants.sqlite", "import shelve", "nobody pickles"),
        ("coordinator.api", "x = __import__('pickle')", "written out"),
        ("coordinator.api", "import importlib\nimportlib.import_module('participants')", "written out"),
        ("participants.server", "from importlib import import_module", "written out"),
        ("cluster.replication.log", "from importlib import import_module as load", "written out"),
    ],
)
def test_every_rule_catches_who_breaks_it(module, source, why):
    found = complaints(module, source)
    assert found
    assert all(why in complaint for complaint in found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("coordinator.protocol.messages", "import re"),
        ("coordinator.protocol.registry", "from coordinator.protocol.two_phase import TwoPhaseCommit"),
        ("coordinator.protocol.two_phase", "from .messages import Abort"),
        ("coordinator.driver", "from cluster.replication.log import ReplicatedLog"),
        ("coordinator.__main__", "from cluster.replication.raft_log import RaftLog"),
        ("cluster.cli", "import coordinator.client, participants.shop, cluster.local"),
        ("cluster.replication.raft", "from pysyncobj import SyncObj"),
        ("coordinator.client_adapters", "from participants.postgres_application import Postgres"),
        ("participants.__main__", "import importlib\nimportlib.import_module(chosen)"),
        ("participants.server", "from coordinator.protocol import messages\nfrom coordinator.codec import json_value"),
    ],
)
def test_what_is_allowed_is_let_through(module, source):
    assert complaints(module, source) == []


def test_there_is_something_to_check():
    assert {"coordinator.protocol.two_phase", "cluster.replication.log", "participants.resource"} <= set(MODULES)
    assert "coordinator.protocol.two_phase" in IMPLEMENTATIONS
