"""How a branch is called in MariaDB, and the statements that leave its marker. Pure: no driver, no I/O.

XA RECOVER lists the branches of all databases of a server, with nothing but their names. So the name says all that has
to be known of a branch that nobody remembers:

    gtrid   <gid>_<database>_<connection>     the cluster stands first; 7 letters for the database; who has prepared it
    bqual   <branch>

The connection matters because a prepared branch belongs to the connection that has prepared it for as long as that one
is open: until then nobody else can finish it. The format id is left at 1: MariaDB does not tell branches apart by it.
The characters are such that XA RECOVER FORMAT='SQL' shows them as they are.

For an application that prepares a branch on its own connection (`participants.prepared`, `outlast.enlisted`):

    SELECT DATABASE(), CONNECTION_ID()
    XA START <xid>; <its own work>
    <marker_statement(gid, branch)>         fails when the branch was aborted, or has ended
    XA END <xid>; XA PREPARE <xid>; and disconnect: only then can the branch be finished
"""

import base64
import hashlib
import re
from typing import Final, NamedTuple

from coordinator.protocol.messages import Gid
from participants.manager import BranchId
from participants.prepared import NUMBER_LIMIT

NAME_LIMIT_BYTES: Final = 64
"""What MariaDB keeps of a gtrid, and of a bqual."""

_CONNECTION_LIMIT: Final = 2**32
"""Connection ids are below it."""

_TAG_CHARS: Final = 7
_PLAIN: Final = re.compile(rb"[A-Za-z0-9 ._-]*")
_GTRID: Final = re.compile(r"([a-z0-9-]+)_([a-z2-7]{7})_(0|[1-9][0-9]{0,9})", re.ASCII)


class Xid(NamedTuple):
    """The name of an XA transaction."""

    gtrid: bytes
    bqual: bytes

    @property
    def sql(self) -> str:
        """As XA statements take it."""
        return f"{_quoted(self.gtrid)},{_quoted(self.bqual)}"


class Named(NamedTuple):
    """What the name of a prepared branch of ours tells. `owner`: the id of the connection that has prepared it."""

    key: BranchId
    owner: int


def database_tag(database: str) -> str:
    """Stands for a database in names, which have no room for 64 characters more."""
    digest = hashlib.sha256(database.encode()).digest()
    return base64.b32encode(digest).decode().lower()[:_TAG_CHARS]


def unfit(gid: Gid, branch: str) -> str | None:
    """Why no branch can have this name; None if it can."""
    if gid.number >= NUMBER_LIMIT:
        return "unfit_gid: its epoch is beyond what a table can hold"
    try:
        too_long = len(branch.encode()) > NAME_LIMIT_BYTES
    except UnicodeEncodeError:
        return "unfit_branch: its name is no Unicode text"
    return f"unfit_branch: its name needs more than {NAME_LIMIT_BYTES} bytes" if too_long else None


def xid_of(gid: str, branch: str, *, database: str, connection: int) -> Xid:
    """The name of a branch that `connection` prepares. Raises `ValueError` for a branch that cannot be one here."""
    parsed = Gid.parse(gid)
    if parsed is None:
        raise ValueError(f"{gid!r} is no gid")
    if (why := unfit(parsed, branch)) is not None:
        raise ValueError(why)
    if not 0 <= connection < _CONNECTION_LIMIT:
        raise ValueError(f"{connection} is no id of a connection")
    return Xid(f"{gid}_{database_tag(database)}_{connection}".encode(), branch.encode())


def named(xid: Xid, *, database: str) -> Named | None:
    """Which branch of `database` it is; None for any other name, those of other databases included."""
    return _read(xid, database_tag(database))


def read_name(xid: Xid) -> Named | None:
    """Which branch it is, of whatever database; None for a name that is not one of ours."""
    return _read(xid, None)


def _read(xid: Xid, tag: str | None) -> Named | None:
    try:
        match = _GTRID.fullmatch(xid.gtrid.decode("ascii"))
        branch = xid.bqual.decode()
    except UnicodeDecodeError:
        return None
    if match is None or tag not in (None, match[2]) or Gid.parse(match[1]) is None or not branch:
        return None
    return Named(BranchId(match[1], branch), int(match[3]))


def pattern(gid: str, branch: str, *, database: str) -> str:
    """For LIKE, with ! as the escape: the text of any statement that may make the branch prepared."""
    start = _quoted(f"{gid}_{database_tag(database)}_".encode()).removesuffix("'")
    end = f",{_quoted(branch.encode())}"
    return f"%{_escaped(start)}%{_escaped(end)}%"


def marker_insert(xid: Xid, gid: Gid, branch: str, result: str | None) -> str:
    """Inserts the branch's marker. It bears the branch's name, so that whoever waits in it can be found.

    Below the floor the state is null, which the table refuses: that branch has ended, and its tombstone is gone.
    """
    cluster, number, name = text(gid.cluster), gid.number, text(branch)
    return (
        f"INSERT /* {xid.sql} */ INTO outlast_branches(cluster, number, branch, state, result)"  # noqa: S608
        f" SELECT {cluster}, {number}, {name}, IF(EXISTS(SELECT 1 FROM outlast_horizons"
        f" WHERE cluster = {cluster} AND floor > {number}), NULL, 'committed'), {text(result)}"
    )


def marker_statement(gid: str, branch: str, *, database: str, connection: int) -> str:
    """The last change of a branch that its application prepares. Raises `ValueError` as `xid_of` does."""
    parsed = Gid.parse(gid)
    xid = xid_of(gid, branch, database=database, connection=connection)
    assert parsed is not None, "xid_of checks it"
    return marker_insert(xid, parsed, branch, None)


def text(value: str | None) -> str:
    """`value` in SQL, whatever the session's settings make of backslashes and quotes."""
    if value is None:
        return "NULL"
    raw = value.encode()
    return f"'{value}'" if _PLAIN.fullmatch(raw) else f"CONVERT(X'{raw.hex()}' USING utf8mb4)"


def _quoted(raw: bytes) -> str:
    return f"'{raw.decode()}'" if _PLAIN.fullmatch(raw) else f"X'{raw.hex()}'"


def _escaped(part: str) -> str:
    return re.sub(r"([!%_])", r"!\1", part)


TABLES: Final = (
    """
CREATE TABLE IF NOT EXISTS outlast_branches(
  cluster varchar(24) NOT NULL, number bigint NOT NULL, branch varchar(64) NOT NULL,
  state varchar(16) NOT NULL, result mediumtext, reason text, retryable boolean NOT NULL DEFAULT 0,
  at timestamp(6) NOT NULL DEFAULT current_timestamp(6),
  PRIMARY KEY (cluster, number, branch), CONSTRAINT outlast_state CHECK (state IN ('committed', 'aborted', 'read_only'))
) ENGINE=InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_nopad_bin
""",
    """
CREATE TABLE IF NOT EXISTS outlast_horizons(
  cluster varchar(24) PRIMARY KEY, epoch bigint NOT NULL, floor bigint NOT NULL
) ENGINE=InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_nopad_bin
""",
)
"""The two tables, where they are missing."""
