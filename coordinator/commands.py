"""Commands of the log: a header and entries, as bytes.

The entries' tags are never given to anything else, and what is written today is read for ever; `levels.py` says how a
new kind of entry comes to be. What is not understood is malformed for every replica, or of newer software: see
`coordinator.ledger`, "What is not understood".
"""

from typing import Final, Literal, get_args

import msgpack
import msgspec

from coordinator.codec import Malformed, Newer, RecordCodec, to_msgpack
from coordinator.protocol.entries import BranchPlan, BranchVote, Entry, Header

COMMAND_VERSION: Final = 1

ENTRIES: Final = RecordCodec(*get_args(Entry), BranchPlan, BranchVote)
"""What an entry is, and what stands in one."""

_COMMAND: Final = msgspec.msgpack.Decoder(tuple[Literal[1], int, int, list[Entry]])


def encode_command(header: Header, entries: list[Entry]) -> bytes:
    """One log command: many entries under one header."""
    return to_msgpack([COMMAND_VERSION, header.epoch, header.at, [ENTRIES.to_plain(entry) for entry in entries]])


def decode_command(command: bytes) -> tuple[Header, list[Entry]]:
    """The inverse of `encode_command`. Raises `Malformed`, and of that kind `Newer`; see "What is not understood"."""
    try:
        _version, epoch, at, entries = _COMMAND.decode(command)
    except (msgspec.MsgspecError, ValueError):
        return _looked_into(command)
    return Header(epoch=epoch, at=at), entries


def _looked_into(command: bytes) -> tuple[Header, list[Entry]]:
    """The same, step by step: it finds out why this is no command, because of newer software or of nobody's making."""
    try:
        plain = msgpack.unpackb(command)
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise Malformed(f"not msgpack: {error}") from error
    if not isinstance(plain, list) or not plain or type(plain[0]) is not int:
        raise Malformed("not a command")
    if plain[0] > COMMAND_VERSION:
        raise Newer(f"a command of version {plain[0]}")
    if len(plain) != 4 or plain[0] != COMMAND_VERSION or not isinstance(plain[3], list):
        raise Malformed("not a command of any version")
    if type(plain[1]) is not int or type(plain[2]) is not int:
        raise Malformed("epoch and date must be integers")
    entries = [ENTRIES.from_plain(item) for item in plain[3]]
    for entry in entries:
        if isinstance(entry, BranchPlan | BranchVote):
            raise Malformed("a part of an entry where an entry should be")
    return Header(epoch=plain[1], at=plain[2]), entries
