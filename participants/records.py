"""Where branches are remembered: two tables in an SQLite database, and the statements on them.

A resource manager that is itself an SQLite database keeps them next to its data, so that a record and the effects that
it speaks of change in one transaction. Others keep them in a file of their own (`participants.per_branch`).

Nothing here begins or ends a transaction: that is the business of whoever knows what belongs together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import apsw

from coordinator.protocol.messages import Gid
from participants.manager import InDoubt, Known, KnownBranch
from participants.resource import Branch, Horizon, State

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS outlast_branch(
  id INTEGER PRIMARY KEY,
  cluster TEXT NOT NULL, number INTEGER NOT NULL, branch TEXT NOT NULL,
  state TEXT NOT NULL, result BLOB, reason TEXT, retryable INTEGER NOT NULL,
  redo BLOB, epoch INTEGER NOT NULL, prepared_at REAL,
  UNIQUE(cluster, number, branch)
);
CREATE INDEX IF NOT EXISTS outlast_branch_prepared ON outlast_branch(prepared_at) WHERE state = 'prepared';
CREATE TABLE IF NOT EXISTS outlast_horizon(
  cluster TEXT PRIMARY KEY, epoch INTEGER NOT NULL, floor INTEGER NOT NULL
) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A branch as it is stored. `redo`: what a commit has to make visible, of prepared branches only."""

    id: int
    branch: Branch
    redo: bytes | None = None


class Records:
    """The two tables of one open database. Every method raises what apsw raises."""

    def __init__(self, connection: apsw.Connection) -> None:
        self._db = connection

    def create(self) -> None:
        """Creates what is missing."""
        self._db.execute(_SCHEMA)

    def load(self, gid: Gid, branch: str) -> Record | None:
        """What is stored of a branch."""
        rows = self._db.execute(
            "SELECT id, state, result, reason, retryable, redo FROM outlast_branch"
            " WHERE cluster = ? AND number = ? AND branch = ?",
            (gid.cluster, gid.number, branch),
        )
        for row_id, state, result, reason, retryable, redo in rows:
            kept = Branch(state=State(state), result=result, reason=reason, retryable=bool(retryable))
            return Record(id=row_id, branch=kept, redo=redo)
        return None

    def insert(
        self, gid: Gid, name: str, branch: Branch, *, epoch: int, at: float | None = None, redo: bytes | None = None
    ) -> int:
        """Stores a branch that had no record, and returns its id. `at`: when it was prepared, in Unix seconds."""
        self._db.execute(
            "INSERT INTO outlast_branch(cluster, number, branch, state, result, reason, retryable, redo, epoch,"
            " prepared_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                gid.cluster,
                gid.number,
                name,
                branch.state.value,
                branch.result,
                branch.reason,
                branch.retryable,
                redo,
                epoch,
                at,
            ),
        )
        return self._db.last_insert_rowid()

    def update(self, row_id: int, branch: Branch) -> None:
        """Stores what became of a branch that had a record, and drops its redo."""
        self._db.execute(
            "UPDATE outlast_branch SET state = ?, result = ?, reason = ?, retryable = ?, redo = NULL WHERE id = ?",
            (branch.state.value, branch.result, branch.reason, branch.retryable, row_id),
        )

    def in_doubt(self) -> Sequence[InDoubt]:
        """The prepared branches, oldest first."""
        rows = self._db.execute(
            "SELECT cluster, number, branch, prepared_at FROM outlast_branch WHERE state = 'prepared'"
            " ORDER BY prepared_at, id"
        )
        return [
            InDoubt(gid=str(Gid.of_number(cluster, number)), branch=branch, prepared_at=at)
            for cluster, number, branch, at in rows
        ]

    def known(self, gids: Sequence[str]) -> Known:
        """All that is stored of some transactions of one cluster."""
        cluster, found = "", []
        for text in gids:
            gid = Gid.parse(text)
            assert gid is not None, "the server checks what it takes"
            cluster = gid.cluster
            rows = self._db.execute(
                "SELECT branch, state FROM outlast_branch WHERE cluster = ? AND number = ? ORDER BY id",
                (gid.cluster, gid.number),
            )
            found += [KnownBranch(gid=text, branch=branch, state=state) for branch, state in rows]
        horizon = self.horizons().get(cluster, Horizon())
        return Known(branches=tuple(found), epoch=horizon.epoch, floor=horizon.floor)

    def prepared(self) -> int:
        """How many branches are prepared."""
        return int(self._db.execute("SELECT count(*) FROM outlast_branch WHERE state = 'prepared'").get)

    def horizons(self) -> dict[str, Horizon]:
        """What was last saved, by cluster."""
        rows = self._db.execute("SELECT cluster, epoch, floor FROM outlast_horizon")
        return {cluster: Horizon(epoch=epoch, floor=floor) for cluster, epoch, floor in rows}

    def save_horizon(self, cluster: str, horizon: Horizon) -> None:
        """Stores what the messages of `cluster` have taught; what is stored only ever rises."""
        self._db.execute(
            "INSERT INTO outlast_horizon VALUES (?, ?, ?)"
            " ON CONFLICT(cluster) DO UPDATE"
            " SET epoch = max(epoch, excluded.epoch), floor = max(floor, excluded.floor)",
            (cluster, horizon.epoch, horizon.floor),
        )

    def prune(self, cluster: str, floor: int, at_most: int) -> int:
        """Forgets ended branches below the floor, oldest first, and returns how many.

        The floor must be saved in the same transaction.
        """
        self._db.execute(
            "DELETE FROM outlast_branch WHERE id IN (SELECT id FROM outlast_branch"
            " WHERE cluster = ? AND number < ? AND state <> 'prepared' ORDER BY number LIMIT ?)",
            (cluster, floor, at_most),
        )
        return self._db.changes()
