"""What `outlast recover` does: from the folders that are left of a cluster to a copy, and to a cluster anew.

Used when more nodes have lost their disks than a cluster survives. Everything here is done with the nodes down. What is
there is read, renamed, and never deleted; what comes of it is a file like `outlast backup` makes, and goes into the new
cluster by the same way.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from cluster.process import ProcessTrouble
from cluster.replication.disk import FolderLocked
from cluster.replication.log import CannotStart, NeedsNewer
from cluster.replication.offline import Offline, has_log, read_committed
from coordinator.codec import Newer
from coordinator.config import NodeConfig
from coordinator.copies import CopyHeader, cut, written
from coordinator.generation import of_folder
from coordinator.ledger import Ledger

_GENERATION: Final = re.compile(r"^generation *=.*\n", re.MULTILINE)
_CLUSTER: Final = re.compile(r"^cluster *=.*\n", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Remains:
    """What a node's folder holds. ledger, log: None where there is nothing that can be read, and `trouble` says why.

    generation: of what is in the folder, whatever the configuration says.
    """

    config: NodeConfig
    ledger: Ledger | None = None
    log: Offline | None = None
    trouble: str | None = None
    generation: int = 1

    @property
    def undecided(self) -> int:
        """Transactions without a decision."""
        return 0 if self.ledger is None else sum(txn.decision is None for txn in self.ledger.unfinished.values())

    def describe(self) -> str:
        """One line for people."""
        if self.ledger is None or self.log is None:
            return f"{self.config.node}: {self.trouble}"
        joining = "" if self.log.voter else ", was coming back empty"
        if self.generation != self.config.generation:
            joining += f"; of generation {self.generation}"
        return (
            f"{self.config.node}: committed up to entry {self.log.committed} of {self.log.last}, epoch "
            f"{self.ledger.epoch}, {len(self.ledger)} transactions, {self.undecided} undecided{joining}"
        )


class _Wary:
    """A ledger that looks at a snapshot as at a copy from elsewhere: into each row, as no start of a node has time to.

    What is left of a lost cluster has seen better days, and whatever comes of it has to be restored elsewhere anyway.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def apply(self, command: bytes) -> object:
        return self._ledger.apply(command)

    def restore(self, pieces: Iterable[bytes]) -> Callable[[], object]:
        """Raises `Malformed`, `NeedsNewer`."""
        held = list(pieces)
        put = self._ledger.restore(held)
        looked = Ledger(self._ledger.cluster)
        try:
            for piece in held:
                looked.feed(piece, foreign=True)
        except Newer as error:
            raise NeedsNewer(f"the snapshot holds {error}") from error
        return put


def examine(config: NodeConfig) -> Remains:
    """Read what is left of one node. Raises `ProcessTrouble` when it runs; blocks."""
    folder = config.data / "log"
    ledger = Ledger(config.cluster)
    try:
        if not has_log(folder):
            return Remains(config=config, trouble=f"there is no log in {folder}")
        generation = of_folder(config.data)
        log = read_committed(folder, _Wary(ledger))
        if generation > 1 and not ledger.epoch_base:
            # Taken for a whole history, it would make everything aborted that the copy says is committed.
            return Remains(config=config, trouble="it still waited for its copy, and knows of no transaction")
        return Remains(config=config, log=log, ledger=ledger, generation=generation)
    except FolderLocked as error:
        raise ProcessTrouble(f"{config.node} runs ({error}); recovering is for a cluster that is down") from error
    except (CannotStart, OSError) as error:
        return Remains(config=config, trouble=f"cannot be read: {error}")


def choose(remains: Sequence[Remains], nodes: int) -> Remains:
    """The one that knows most to be committed. Raises `ProcessTrouble`, also where there is no need to recover."""
    readable = [each for each in remains if each.log is not None]
    # An older generation may have the longer log; what was told since is not in it.
    newest = max((each.generation for each in readable), default=1)
    usable = [each for each in readable if each.generation == newest]
    voters = [each for each in usable if each.log is not None and each.log.voter]
    if len(voters) > nodes // 2:
        raise ProcessTrouble(
            f"{len(voters)} of {nodes} nodes have their logs, which is a majority: nothing is lost. Start them, and "
            "let the others come back with --rejoin (docs/DISKS.md)"
        )
    if not usable:
        said = "; ".join(each.describe() for each in remains)
        raise ProcessTrouble(
            f"there is nothing to recover from: {said}. A backup may help: `outlast restore` (docs/RECOVERY.md)"
        )
    return max(usable, key=lambda each: each.log.committed if each.log is not None else 0)


def copy_of(remains: Remains, *, now_ms: int) -> tuple[CopyHeader, Iterator[bytes]]:
    """What was found as a copy, part by part."""
    ledger = remains.ledger
    assert ledger is not None, "chosen because it could be read"
    newest = ledger.newest()
    header = CopyHeader(
        cluster=ledger.cluster,
        level=ledger.level,
        epoch=ledger.epoch,
        generation=remains.generation,
        made_at=now_ms,
        transactions=len(ledger),
        undecided=remains.undecided,
        newest=None if newest is None else str(newest),
        certain=False,
    )
    return header, written(header, cut(ledger.snapshot()()))


def save_copy(remains: Remains, file: Path, *, now_ms: int) -> CopyHeader:
    """Write what was found as a copy, synced; only its owner can read it. Raises `ProcessTrouble`."""
    header, parts = copy_of(remains, now_ms=now_ms)
    try:
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(handle, "wb") as out:
            out.writelines(parts)
            out.flush()
            os.fsync(out.fileno())
        _sync_folder(file.absolute().parent)
    except OSError as error:
        raise ProcessTrouble(f"{file} cannot be written: {error.strerror}; nothing else was changed") from error
    return header


def set_aside(config: NodeConfig) -> Path | None:
    """Rename the node's folder, so that the node starts empty; where it is now. Raises `ProcessTrouble`."""
    if not config.data.exists():
        return None
    for number in range(1, 1000):
        aside = config.data.with_name(
            f"{config.data.name}.generation-{config.generation}" + (f".{number}" if number > 1 else "")
        )
        if not aside.exists():
            break
    try:
        config.data.rename(aside)
        _sync_folder(aside.parent)
    except OSError as error:
        raise ProcessTrouble(f"{config.data} cannot be renamed to {aside.name}: {error.strerror}") from error
    return aside


def note_generation(file: Path, generation: int) -> None:
    """Write the generation into a node's TOML file, which is replaced as a whole. Raises `ProcessTrouble`."""
    line = f"generation = {generation}\n"
    try:
        text = file.read_text()
        if _GENERATION.search(text):
            changed = _GENERATION.sub(line, text, count=1)
        else:
            changed = _CLUSTER.sub(lambda found: found[0] + line, text, count=1)
        draft = file.with_suffix(".partial")
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, file.stat().st_mode & 0o777)
        with open(handle, "w") as out:
            out.write(changed)
            out.flush()
            os.fsync(out.fileno())
        draft.replace(file)
        _sync_folder(file.parent)
    except OSError as error:
        raise ProcessTrouble(f"{file} cannot be changed: {error.strerror}") from error


def copy_name(folder: Path, now_ms: int) -> Path:
    """Where a recovered copy goes."""
    stamp = datetime.fromtimestamp(now_ms / 1000, UTC).strftime("%Y%m%d-%H%M%S")
    return folder / f"recovered-{stamp}.outlast"


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
