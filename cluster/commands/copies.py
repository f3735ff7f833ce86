"""`outlast backup`: what a cluster remembers, as one file."""

import argparse
import asyncio
import contextlib
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Final

from cluster.calls import Answer, Caller, Unreachable, Unverified
from cluster.cli import FAILED, OK, complain, print_json
from cluster.commands.tx import with_nodes
from cluster.process import ProcessTrouble
from coordinator.copies import CopyBroken, CopyHeader, CopyReader

_PART_BYTES: Final = 1 << 20
_STALL_S: Final = 60.0
"""Until a connection on which nothing moves is given up; a node gives up sooner."""


def backup(arguments: argparse.Namespace) -> int:
    """Copy a running cluster, or look at a copy."""
    if arguments.verify:
        header, size = read_copy(arguments.file)
        _show(arguments, arguments.file, header, size)
        return OK
    if arguments.file.exists():
        raise ProcessTrouble(f"{arguments.file} is there already; name another file, or move that one away")
    return with_nodes(arguments, _backup)


async def _backup(arguments: argparse.Namespace, caller: Caller) -> int:
    file: Path = arguments.file
    last: Answer | Unreachable = Unreachable("no node to ask")
    for url in caller.urls:
        try:
            found = await _fetch(caller, url, file)
        except Unverified:
            raise
        except (Unreachable, CopyBroken) as error:
            last = error if isinstance(error, Unreachable) else Unreachable(f"{url}: {error}")
            continue
        if not isinstance(found, Answer):
            _show(arguments, file, *found)
            return OK
        last = found
        if last.status != 503:
            break
    if isinstance(last, Answer):
        return complain(f"there is no copy: {last.trouble}", FAILED)
    return complain(f"there is no copy: {last}", FAILED)


async def _fetch(caller: Caller, url: str, file: Path) -> "tuple[CopyHeader, int] | Answer":
    """One try at one node. Raises `Unreachable`, `CopyBroken`, `ProcessTrouble`."""
    draft = file.with_name(f".{file.name}.{os.getpid()}.partial")
    reader = CopyReader()
    loop = asyncio.get_running_loop()
    try:
        try:
            with private(draft) as out:

                def take(part: bytes) -> None:
                    reader.feed(part)
                    out.write(part)

                refused = await caller.download(f"{url}/v1/backup", take, stall_s=_STALL_S)
                if refused is not None:
                    return refused
                header, _trailer = reader.end()
                out.flush()
                await loop.run_in_executor(None, os.fsync, out.fileno())
            await loop.run_in_executor(None, put_in_place, draft, file)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise ProcessTrouble(f"{file} cannot be written: {error.strerror}") from error
    return header, reader.size


def private(file: Path) -> BinaryIO:
    """A new file that only its owner can read: copies hold payloads and idempotency keys. Raises OSError."""
    return open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb")


def put_in_place(draft: Path, file: Path) -> None:
    """Give a file that is synced its name, durably, and replace nothing. Raises OSError."""
    os.link(draft, file)  # which, unlike a rename, fails where something is
    folder = os.open(file.absolute().parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_copy(file: Path) -> tuple[CopyHeader, int]:
    """What a file is a copy of, and its size, after all of it was verified. Raises `ProcessTrouble`."""
    reader = CopyReader()
    with _readable(file):
        for part in parts_of(file):
            reader.feed(part)
        header, _trailer = reader.end()
    return header, reader.size


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except CopyBroken as error:
        raise ProcessTrouble(f"{file} is no whole copy: {error}") from error
    except OSError as error:
        raise ProcessTrouble(f"{file} cannot be read: {error.strerror}") from error


def parts_of(file: Path) -> Iterator[bytes]:
    """Its bytes. Raises OSError."""
    with file.open("rb") as opened:
        while part := opened.read(_PART_BYTES):
            yield part


def document(file: Path, header: CopyHeader, size: int) -> dict[str, Any]:
    """What programs are told of a copy."""
    made_at = datetime.fromtimestamp(header.made_at / 1000, UTC).isoformat(timespec="milliseconds")
    return {**header.to_plain(), "made_at": made_at.replace("+00:00", "Z"), "file": str(file), "bytes": size}


def _show(arguments: argparse.Namespace, file: Path, header: CopyHeader, size: int) -> None:
    shown = document(file, header, size)
    if arguments.json:
        print_json(shown)
        return
    print(
        f"{file}: a whole copy of the cluster {header.cluster} as of {shown['made_at']}, {size} bytes\n"
        f"  {header.transactions} transactions, {header.undecided} of them undecided; epoch {header.epoch}"
    )
