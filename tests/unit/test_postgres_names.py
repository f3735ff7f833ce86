"""Names of branches in PostgreSQL: own alphabet, there and back, and nothing else is ours."""

import dataclasses
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.protocol.messages import Gid
from participants.arguments import read_dsn
from participants.manager import BranchId
from participants.postgres_names import (
    NAME_LIMIT_BYTES,
    SESSION_LIMIT_BYTES,
    branch_of,
    literal,
    marker_statement,
    session_name,
    tables,
    transaction_name,
    unfit,
)
from participants.prepared import PreparedSettings, is_enlisted
from participants.settings import SettingsError

GID = "shop-3-17"


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_every_branch_has_a_name_without_quotes_and_is_read_back(branch):
    name = transaction_name(GID, branch)
    assert re.fullmatch(r"[A-Za-z0-9._:%-]+", name)
    assert branch_of(name) == BranchId(GID, branch)
    assert len(session_name(GID, branch)) <= SESSION_LIMIT_BYTES


@pytest.mark.parametrize(
    "name",
    [
        *("outlast", "outlast:", "outlast:shop-3-17", "outlast:shop:b", "outlast:shop-03-17:b", "shop-3-17:b"),
        *("outlast:shop-3-17:%6d", "outlast:shop-3-17:%6D", "outlast:shop-3-17:%FF", "outlast:shop-3-17:a b"),
        *("OUTLAST:shop-3-17:b", "outlast:shop-3-17:b\n", "outlast:Shop-3-17:b", "outlast:shop-3-17:%2"),
    ],
)
def test_what_is_not_spelt_as_we_spell_it_is_not_ours(name):
    assert branch_of(name) is None


def test_a_name_that_does_not_fit_is_told():
    assert unfit(Gid.parse(GID), "b" * (NAME_LIMIT_BYTES - len("outlast:shop-3-17:"))) is None
    assert unfit(Gid.parse(GID), "b" * (NAME_LIMIT_BYTES - len("outlast:shop-3-17:") + 1)).startswith("unfit_branch")
    assert unfit(Gid.parse(GID), "\ud800").startswith("unfit_branch")
    assert unfit(Gid.parse("shop-9999999-1"), "b").startswith("unfit_gid")
    with pytest.raises(ValueError, match="unfit_branch"):
        marker_statement(GID, "b" * 200)
    with pytest.raises(ValueError, match="no gid"):
        marker_statement("shop", "b")


def test_long_names_of_sessions_stay_apart():
    names = {session_name(GID, "b" * 80 + end) for end in "xyz"}
    assert len(names) == 3


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
def test_a_literal_has_no_quote_inside(text):
    inner = literal(text)
    assert inner.count("'") in (2, 6)
    assert "\\" not in inner


def test_only_the_reserved_operation_is_enlisted():
    assert is_enlisted(b'{"op": "outlast.enlisted"}')
    for other in (b'{"op": "pay", "to": "outlast.enlisted"}', b'"outlast.enlisted"', b"outlast.enlisted", b"{}"):
        assert not is_enlisted(other)


def test_a_password_stays_out_of_the_list_of_processes(tmp_path, monkeypatch):
    for dsn in (
        "postgresql://ann:secret@db/shop",
        "postgresql://ann@db/shop?password=secret",
        "password=secret host=x",
        "postgresql://ann@db/shop?sslkey=k&sslpassword=secret",
    ):
        with pytest.raises(SettingsError, match="--dsn-file") as caught:
            read_dsn(dsn, None)
        assert "secret" not in str(caught.value)
    assert read_dsn("postgresql://ann@db:5432/shop?host=/tmp/x", None) == "postgresql://ann@db:5432/shop?host=/tmp/x"
    file = tmp_path / "dsn"
    file.write_text("postgresql://ann:secret@db/shop\n")
    file.chmod(0o644)
    with pytest.raises(SettingsError, match="chmod 600"):
        read_dsn(None, file)
    file.chmod(0o600)
    assert read_dsn(None, file) == "postgresql://ann:secret@db/shop"
    monkeypatch.delenv("OUTLAST_DSN", raising=False)
    with pytest.raises(SettingsError, match="OUTLAST_DSN"):
        read_dsn(None, None)
    monkeypatch.setenv("OUTLAST_DSN", "postgresql://db/shop")
    assert read_dsn(None, None) == "postgresql://db/shop"


def test_the_manual_has_the_tables_as_they_are():
    assert tables("public").strip() in (Path(__file__).parents[2] / "docs" / "POSTGRESQL.md").read_text()


def test_the_manual_has_every_limit_and_its_default():
    text = (Path(__file__).parents[2] / "docs" / "CONFIGURATION.md").read_text()
    for field in dataclasses.fields(PreparedSettings):
        shown = re.search(rf"^\| `{field.name}` \| ([0-9,]+)( KiB)? \|", text, re.MULTILINE)
        assert shown, field.name
        assert int(shown[1].replace(",", "")) * (1024 if shown[2] else 1) == field.default
