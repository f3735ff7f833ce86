"""The term and the vote of a node, in a file of their own.

A node that forgets its vote can vote twice in one term, and then two leaders decide. So the two are on disk before any
word of them leaves the node: written to a new file, synced, renamed over the old one, and the folder synced, because a
rename is only durable with its folder. A file that cannot be read is never taken for "no vote yet": the node refuses to
start, and says which file it was.
"""

import json
import os
import zlib
from pathlib import Path

from cluster.replication.log import CannotStart

_FORMAT = 1


class TermFileBroken(CannotStart):
    """The file exists and cannot be trusted; without it this node must not vote. Names the file."""


class TermFile:
    """Term and vote at `path`. Both methods block on the disk."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def load(self) -> tuple[int, str | None]:
        """Term and vote as last stored; (0, None) where nothing was ever stored. Raises `TermFileBroken`."""
        try:
            text = self._path.read_bytes()
        except FileNotFoundError:
            return 0, None
        try:
            stored = json.loads(text)
            kind, term, vote, check = stored["format"], stored["term"], stored["vote"], stored["check"]
        except (ValueError, KeyError, TypeError) as error:
            raise TermFileBroken(f"{self._path}: not a term file ({error})") from error
        if kind != _FORMAT or check != _check(term, vote):
            raise TermFileBroken(f"{self._path}: damaged, or of another format")
        return term, vote

    def store(self, term: int, vote: str | None) -> None:
        """Keep both; they are on disk when this returns. Raises OSError."""
        text = json.dumps({"format": _FORMAT, "term": term, "vote": vote, "check": _check(term, vote)})
        fresh = self._path.with_name(self._path.name + ".new")
        handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.write(handle, text.encode())
            os.fsync(handle)
        finally:
            os.close(handle)
        fresh.replace(self._path)
        sync_folder(self._path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable: new, renamed and removed files."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _check(term: object, vote: object) -> int:
    return zlib.crc32(f"{term!r} {vote!r}".encode())
