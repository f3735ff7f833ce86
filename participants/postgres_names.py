"""How a branch is called in PostgreSQL, and the statements that leave its marker. Pure: no driver, no I/O.

`outlast:<gid>:<branch>` is the name of a branch's prepared transaction: what says `outlast:` is ours, then comes the
cluster. Names of prepared transactions are shared by all databases of a server, and cannot be bind parameters, so the
alphabet is one that needs no quoting: letters, digits and `._-:`, anything else as %XX.

For an application that prepares a branch on its own connection (`participants.prepared`, `outlast.enlisted`):

    BEGIN; <its own work>
    <marker_statement(gid, branch)>         fails when the branch was aborted, or has ended
    PREPARE TRANSACTION '<transaction_name(gid, branch)>'
"""

import hashlib
import re
from functools import lru_cache
from typing import Final

from coordinator.protocol.messages import Gid
from participants.manager import BranchId
from participants.prepared import NUMBER_LIMIT

PREFIX: Final = "outlast:"

NAME_LIMIT_BYTES: Final = 199
"""What PostgreSQL keeps of the name of a prepared transaction."""

SESSION_LIMIT_BYTES: Final = 63
"""What it keeps of an application_name."""

_YOUNG: Final = "10 minutes"

_PLAIN: Final = re.compile(rb"[A-Za-z0-9._-]")
_ALL_PLAIN: Final = re.compile(r"[A-Za-z0-9._-]*", re.ASCII)
_NAME: Final = re.compile(r"outlast:([a-z0-9-]+):((?:[A-Za-z0-9._-]|%[0-9A-F]{2})*)", re.ASCII)
_DIGEST_CHARS: Final = 16


@lru_cache(maxsize=8192)
def unfit(gid: Gid, branch: str) -> str | None:
    """Why no branch can have this name; None if it can."""
    if gid.number >= NUMBER_LIMIT:
        return "unfit_gid: its epoch is beyond what a table can hold"
    try:
        too_long = len(transaction_name(str(gid), branch)) > NAME_LIMIT_BYTES
    except UnicodeEncodeError:
        return "unfit_branch: its name is no Unicode text"
    return f"unfit_branch: its name needs more than {NAME_LIMIT_BYTES} bytes in PostgreSQL" if too_long else None


@lru_cache(maxsize=8192)
def transaction_name(gid: str, branch: str) -> str:
    """The name of the branch's prepared transaction. It needs no quoting within single quotes."""
    if _ALL_PLAIN.fullmatch(branch) is not None:
        return f"{PREFIX}{gid}:{branch}"
    raw = branch.encode()
    coded = "".join(chr(byte) if _PLAIN.match(raw, at) else f"%{byte:02X}" for at, byte in enumerate(raw))
    return f"{PREFIX}{gid}:{coded}"


def branch_of(name: str) -> BranchId | None:
    """The branch that a prepared transaction is; None when the name is not one that `transaction_name` makes."""
    match = _NAME.fullmatch(name)
    if match is None or Gid.parse(match[1]) is None:
        return None
    raw = re.sub(rb"%([0-9A-F]{2})", lambda coded: bytes((int(coded[1], 16),)), match[2].encode())
    try:
        found = BranchId(match[1], raw.decode())
    except UnicodeDecodeError:
        return None
    # Only the canonical spelling is ours.
    return found if transaction_name(*found) == name else None


def session_name(gid: str, branch: str) -> str:
    """The application_name of a connection while it works on the branch: its transaction's name, cut if need be."""
    name = transaction_name(gid, branch)
    if len(name) <= SESSION_LIMIT_BYTES:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:_DIGEST_CHARS]
    return f"{name[: SESSION_LIMIT_BYTES - _DIGEST_CHARS - 1]}~{digest}"


@lru_cache(maxsize=1024)
def literal(text: str | None) -> str:
    """`text` in SQL, whatever the session's settings make of backslashes and quotes."""
    if text is None:
        return "NULL"
    if re.fullmatch(r"[A-Za-z0-9 ._:,%~-]*", text, re.ASCII):
        return f"'{text}'"
    return f"convert_from(decode('{text.encode().hex()}', 'hex'), 'UTF8')"


def identifier(name: str) -> str:
    """A schema's name in SQL."""
    return '"' + name.replace('"', '""') + '"'


def marker_statement(gid: str, branch: str, *, schema: str = "public") -> str:
    """The last change of a branch that its application prepares. It also names the session, so that it can be fenced.

    Raises `ValueError` for a branch that cannot be one here.
    """
    parsed = Gid.parse(gid)
    if parsed is None:
        raise ValueError(f"{gid!r} is no gid")
    if (why := unfit(parsed, branch)) is not None:
        raise ValueError(why)
    values = f"{literal(parsed.cluster)}, {parsed.number}, {literal(branch)}, NULL"
    return f"SET LOCAL application_name TO {literal(session_name(gid, branch))}; " + marker_insert(schema, values)


def marker_insert(schema: str, values: str) -> str:
    """Inserts a marker. `values`: SQL of cluster, number, branch and result.

    Below the floor the state is null, which the table refuses: that branch has ended, and its tombstone is gone.

    Above READ COMMITTED a transaction sees the floor as it was when it began. So there it must have begun less than
    `_YOUNG` ago, which is less than a coordinator remembers what has ended, or after the tombstone, which it sees then.
    """
    where = identifier(schema)
    return (
        f"INSERT INTO {where}.outlast_branches(cluster, number, branch, state, result)"  # noqa: S608  # our own words
        " SELECT cluster, number, branch, CASE WHEN EXISTS (SELECT FROM"
        f" {where}.outlast_horizons AS h WHERE h.cluster = given.cluster AND h.floor > given.number)"
        " THEN NULL WHEN current_setting('transaction_isolation') IN ('repeatable read', 'serializable')"
        f" AND (clock_timestamp() - now() > interval '{_YOUNG}' OR EXISTS (SELECT FROM {where}.outlast_branches AS b"
        " WHERE (b.cluster, b.number, b.branch) = (given.cluster, given.number, given.branch)))"
        " THEN NULL ELSE 'committed' END, result"
        f" FROM (SELECT {values}) AS given(cluster, number, branch, result)"
    )


def tables(schema: str) -> str:
    """Creates the two tables, where they are missing."""
    where = identifier(schema)
    return f"""
CREATE TABLE IF NOT EXISTS {where}.outlast_branches(
  cluster text COLLATE "C" NOT NULL, number bigint NOT NULL, branch text COLLATE "C" NOT NULL,
  state text COLLATE "C" NOT NULL CHECK (state IN ('committed', 'aborted', 'read_only')),
  result text, reason text, retryable boolean NOT NULL DEFAULT false, at timestamptz NOT NULL DEFAULT now(),
  PRIMARY KEY (cluster, number, branch)
);
CREATE TABLE IF NOT EXISTS {where}.outlast_horizons(
  cluster text COLLATE "C" PRIMARY KEY, epoch bigint NOT NULL, floor bigint NOT NULL
);
"""
