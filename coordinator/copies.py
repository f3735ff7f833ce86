"""A copy of the ledger as a file: what `GET /v1/backup` streams, and `POST /v1/restore` takes.

    magic 8 | format 4
    kind 1 | length 4 | payload | CRC 4        as many frames as there are

The first frame is the header (`H`), a msgpack map; then come pieces (`P`), which are those of `Ledger.snapshot`, cut so
that each fits into one log command; the last is the trailer (`T`), a map with the count of the pieces and a digest
over all of them. Nothing follows it. Integers are unsigned and little-endian. A CRC-32 covers kind, length and payload,
so damage shows where it is; and a file that was cut off has no trailer.

The digest is a chain: each link is the SHA-256 of the link before it and the piece. So replicas that receive the pieces
one by one need to keep only the last link, also in a snapshot taken midway.
"""

import hashlib
import reprlib
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import msgpack

from coordinator.codec import Malformed
from coordinator.config import valid_name
from coordinator.protocol.messages import Gid
from coordinator.rendering import LAST_MS

MAGIC: Final = b"outlcopy"
FORMAT: Final = 1
PIECE_BYTES: Final = 256 << 10
"""Pieces are cut to about this size; a single transaction that is larger stays whole."""

NO_DIGEST: Final = b""
"""Before the first link of the chain."""

_HEAD: Final = struct.Struct("<8sI")
_FRAME: Final = struct.Struct("<cI")
_CRC: Final = struct.Struct("<I")
_HEADER, _PIECE, _TRAILER = b"H", b"P", b"T"
_FRAME_BYTES_MAX: Final = 64 << 20


class CopyBroken(Malformed):
    """Not a copy, or not a whole one. Says where, and what is wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyHeader:
    """What a copy is of.

    level: that the cluster worked at.
    epoch: the last one begun in what is copied.
    generation: of the cluster, see `NodeConfig`.
    made_at: milliseconds since 1970.
    transactions, undecided: in the table, ended ones included; and those of them without a decision.
    newest: the last gid in it, None without transactions.
    certain: False for a copy of one node's folder, of which only what is known to be committed was taken.
    """

    cluster: str
    level: int
    epoch: int
    generation: int
    made_at: int
    transactions: int
    undecided: int
    newest: str | None
    certain: bool = True

    def to_plain(self) -> dict[str, Any]:
        """As the file and the API show it."""
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def of(cls, plain: object) -> "CopyHeader":
        """The inverse. Raises `CopyBroken`; what later software may have added is passed over."""
        if not isinstance(plain, dict):
            raise CopyBroken("the header is no map")
        values: dict[str, Any] = {}
        for name, kinds in _HEADER_TYPES.items():
            value = plain.get(name)
            # Counts and epochs are far below the last of dates.
            if type(value) not in kinds or (type(value) is int and not 0 <= value <= LAST_MS):
                raise CopyBroken(f"the header's {name} cannot be {reprlib.repr(value):.60}")
            values[name] = value
        if not valid_name(values["cluster"]) or (values["newest"] is not None and Gid.parse(values["newest"]) is None):
            raise CopyBroken("the header names no cluster, or no transaction")
        return cls(**values)


_HEADER_TYPES: Final[dict[str, tuple[type, ...]]] = {
    "cluster": (str,),
    "level": (int,),
    "epoch": (int,),
    "generation": (int,),
    "made_at": (int,),
    "transactions": (int,),
    "undecided": (int,),
    "newest": (str, type(None)),
    "certain": (bool,),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyTrailer:
    """What came before it: how many pieces, and the last link of the chain."""

    pieces: int
    digest: bytes


def chained(digest: bytes, piece: bytes) -> bytes:
    """The next link."""
    return hashlib.sha256(digest + piece).digest()


def cut(pieces: Iterable[bytes], most: int = PIECE_BYTES) -> Iterator[bytes]:
    """The pieces of a snapshot, with lists of rows split until each is small, or is one row."""
    for number, piece in enumerate(pieces):
        rows = msgpack.unpackb(piece) if number and len(piece) > most else None
        if not isinstance(rows, list):
            yield piece
            continue
        held: list[bytes] = []
        size = 0
        for row in rows:
            packed = msgpack.packb(row)
            if held and size + len(packed) > most:
                yield _list_of(held)
                held, size = [], 0
            held.append(packed)
            size += len(packed)
        yield _list_of(held)


def _list_of(items: list[bytes]) -> bytes:
    packer = msgpack.Packer()
    head: bytes = packer.pack_array_header(len(items))
    return head + b"".join(items)


# ------------------------------------------------------------------------------------------------ writing


def written(header: CopyHeader, pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The file, part by part. `pieces` are used as they are: see `cut`."""
    yield _HEAD.pack(MAGIC, FORMAT) + _framed(_HEADER, msgpack.packb(header.to_plain()))
    digest, count = NO_DIGEST, 0
    for piece in pieces:
        digest = chained(digest, piece)
        count += 1
        yield _framed(_PIECE, piece)
    yield _framed(_TRAILER, msgpack.packb({"pieces": count, "digest": digest}))


def _framed(kind: bytes, payload: bytes) -> bytes:
    head = _FRAME.pack(kind, len(payload))
    return head + payload + _CRC.pack(zlib.crc32(payload, zlib.crc32(head)))


# ------------------------------------------------------------------------------------------------ reading


class CopyReader:
    """Takes the file as it comes, in parts of any size: `feed` returns what is whole by then, and `end` says if all is.

    most: bytes of one frame.
    """

    def __init__(self, most: int = _FRAME_BYTES_MAX) -> None:
        self.header: CopyHeader | None = None
        self.trailer: CopyTrailer | None = None
        self.pieces = 0
        self.size = 0
        """Bytes taken so far."""
        self._most = most
        self._rest = bytearray()
        self._begun = False
        self._digest = NO_DIGEST

    def feed(self, data: bytes) -> list[bytes]:
        """Pieces that are whole now, each verified. Raises `CopyBroken`."""
        self.size += len(data)
        self._rest += data
        found: list[bytes] = []
        if not self._begun:
            if len(self._rest) < _HEAD.size:
                return found
            magic, kind = _HEAD.unpack_from(self._rest)
            if magic != MAGIC:
                raise CopyBroken("this is no copy of a ledger")
            if kind != FORMAT:
                raise CopyBroken(f"this copy is of format {kind}; this software reads {FORMAT}")
            del self._rest[: _HEAD.size]
            self._begun = True
        at = 0
        while len(self._rest) - at >= _FRAME.size:
            kind, length = _FRAME.unpack_from(self._rest, at)
            if kind not in (_HEADER, _PIECE, _TRAILER) or length > self._most:
                raise CopyBroken(f"damaged at byte {self._offset(at)}: no frame of a copy begins there")
            end = at + _FRAME.size + length + _CRC.size
            if len(self._rest) < end:
                break
            (check,) = _CRC.unpack_from(self._rest, end - _CRC.size)
            if check != zlib.crc32(memoryview(self._rest)[at : end - _CRC.size]):
                raise CopyBroken(f"damaged between bytes {self._offset(at)} and {self._offset(end)}")
            payload = bytes(memoryview(self._rest)[at + _FRAME.size : end - _CRC.size])
            if self._take(kind, payload, self._offset(at)):
                found.append(payload)
            at = end
        del self._rest[:at]
        if self.trailer is not None and self._rest:
            raise CopyBroken(f"something follows its end, at byte {self._offset(0)}")
        return found

    def _offset(self, at: int) -> int:
        return self.size - len(self._rest) + at

    def _take(self, kind: bytes, payload: bytes, offset: int) -> bool:
        """One frame; True if it is a piece."""
        if self.trailer is not None:
            raise CopyBroken(f"something follows its end, at byte {offset}")
        if (kind == _HEADER) != (self.header is None):
            raise CopyBroken(f"a header where none should be, or none where one should, at byte {offset}")
        if kind == _PIECE:
            self.pieces += 1
            self._digest = chained(self._digest, payload)
            return True
        try:
            plain = msgpack.unpackb(payload)
        except (ValueError, msgpack.exceptions.UnpackException) as error:
            raise CopyBroken(f"not msgpack at byte {offset}: {error}") from error
        if kind == _HEADER:
            self.header = CopyHeader.of(plain)
            return False
        if not isinstance(plain, dict) or plain.get("pieces") != self.pieces or plain.get("digest") != self._digest:
            raise CopyBroken(f"its trailer speaks of other pieces than these {self.pieces}")
        self.trailer = CopyTrailer(pieces=self.pieces, digest=self._digest)
        return False

    def end(self) -> tuple[CopyHeader, CopyTrailer]:
        """All has been fed. Raises `CopyBroken` when it is not whole."""
        if self.header is None or self.trailer is None:
            raise CopyBroken(f"cut off after {self.size} bytes: its end is missing")
        return self.header, self.trailer
