"""`outlast backup`, `outlast restore`: what a cluster remembers, as one file, out of it and into a new one."""

import argparse
import asyncio
import contextlib
import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Final

from cluster.answers import reconciliation
from cluster.calls import Answer, Caller, NotConnected, Unreachable, Unverified
from cluster.cli import FAILED, OK, UNKNOWN, USAGE, complain, print_json
from cluster.commands.tx import with_nodes
from cluster.process import ProcessTrouble
from coordinator.copies import CopyBroken, CopyHeader, CopyReader

_PART_BYTES: Final = 1 << 20
_LEADER_S: Final = 30.0
"""Until a cluster that has just been started counts as one that will not take a copy."""
_PAUSE_S: Final = 0.2
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
        f"  {header.transactions} transactions, {header.undecided} of them undecided; epoch {header.epoch}, "
        f"generation {header.generation}"
    )


# ------------------------------------------------------------------------------------------------ restore


def restore(arguments: argparse.Namespace) -> int:
    """Put a copy into a new cluster; or look how far finding out is, or leave a participant out."""
    if arguments.without is not None:
        return with_nodes(arguments, _leave_out)
    if arguments.status:
        return with_nodes(arguments, _status)
    if arguments.file is None:
        return complain("name the copy to restore, or use --status", USAGE)
    header, size = read_copy(arguments.file)
    return with_nodes(arguments, lambda asked, caller: _restore(asked, caller, header, size))


async def _restore(arguments: argparse.Namespace, caller: Caller, header: CopyHeader, size: int) -> int:
    answer = await put_back(caller, arguments.file, size, above=arguments.above_epoch)
    if answer.status != 200:
        if arguments.json:
            print_json(answer.body)
        return complain(answer.trouble, UNKNOWN if _is_unknown(answer) else FAILED)
    if not arguments.json:
        print(f"restored {header.transactions} transactions; asking the participants what was lost ...", flush=True)
    found = await found_out(caller, arguments.wait)
    _show_status(arguments, found)
    return OK if not found["open"] else _still_open(found)


async def put_back(caller: Caller, file: Path, size: int, *, above: int = 0, within_s: float = _LEADER_S) -> Answer:
    """What the cluster says to a copy; asks again while nothing was done because nobody led, or its level is not there.

    Also where it could not say whether it was done, and turns out to be as empty as before.
    Raises `Unreachable` when it is not known whether it was done, `NotConnected` when nobody was there.
    """
    deadline_s = time.monotonic() + within_s
    while True:
        last: Answer | NotConnected = NotConnected("no node to ask")
        for url in caller.urls:
            try:
                last = await caller.upload(
                    f"{url}/v1/restore?above_epoch={above}", parts_of(file), size=size, stall_s=_STALL_S
                )
            except NotConnected as error:
                last = error
                continue
            if last.status != 503 or (_is_unknown(last) and not await _is_fresh(caller)):
                return last
        if time.monotonic() > deadline_s:
            if isinstance(last, NotConnected):
                raise last
            return last
        await asyncio.sleep(_PAUSE_S)


def _is_unknown(answer: Answer) -> bool:
    return isinstance(answer.body, dict) and answer.body.get("code") in ("unknown", "internal")


async def _is_fresh(caller: Caller) -> bool:
    """Whether the leader is sure that no copy has got in."""
    try:
        answer = await caller.anywhere("GET", "/v1/reconciliation", within_s=_LEADER_S)
    except Unreachable:
        return False
    return answer.status == 200 and isinstance(answer.body, dict) and answer.body.get("fresh") is True


async def found_out(caller: Caller, within_s: float) -> dict[str, Any]:
    """How far finding out what was lost is: once it is over, or after `within_s`. Raises `Unreachable`."""
    deadline_s = time.monotonic() + within_s
    while True:
        answer = await caller.anywhere("GET", "/v1/reconciliation", within_s=_LEADER_S)
        if answer.status != 200:
            raise Unreachable(answer.trouble)
        found = reconciliation(answer)
        if not found["open"] or time.monotonic() > deadline_s:
            return found
        await asyncio.sleep(_PAUSE_S)


async def _status(arguments: argparse.Namespace, caller: Caller) -> int:
    _show_status(arguments, await found_out(caller, 0.0))
    return OK


async def _leave_out(arguments: argparse.Namespace, caller: Caller) -> int:
    body = {"without": arguments.without}
    answer = await caller.anywhere("PUT", "/v1/reconciliation", body=body, within_s=_LEADER_S)
    if answer.status != 200:
        return complain(answer.trouble, FAILED)
    _show_status(arguments, reconciliation(answer))
    return OK


def _show_status(arguments: argparse.Namespace, found: dict[str, Any]) -> None:
    if arguments.json:
        print_json(found)
        return
    for line in status_lines(found):
        print(line)


def status_lines(found: dict[str, Any]) -> Iterator[str]:
    """How far finding out is, for people."""
    settled = ", ".join(f"{count} {what}" for what, count in found["settled"].items())
    if found["awaits_copy"]:
        yield "this cluster waits for the copy that it is to go on from: outlast restore FILE"
        return
    if not found["open"]:
        yield f"nothing is open; found out since this node leads: {settled}"
        return
    yield f"open: {found['undecided']} undecided, {found['prepared']} prepared somewhere; found out: {settled}"
    for name, view in found["participants"].items():
        if view["trouble"] or view["can_tell"] is False:
            yield f"  {name}: {view['trouble'] or 'cannot tell what it has committed'}"
    if found["without"]:
        yield f"  not waited for: {', '.join(found['without'])}"


def _still_open(found: dict[str, Any]) -> int:
    names = ", ".join(found["waiting_for"]) or "its participants"
    return complain(
        f"restored, and not all is found out yet: {names} must answer. It goes on by itself; look with `outlast "
        "restore --status`, register who has moved, or leave somebody out with --without (docs/RECOVERY.md)",
        UNKNOWN,
    )
