"""The ledger's rows and keys in memory: lean, ordered, and frozen in no time.

A million ended transactions as a dict cost 100 bytes each beside their content, and a tenth of a second to copy, in
which a leader says nothing to anybody. Numbers of transactions follow each other, so here they are places: `Rows` keeps
chunks of consecutive numbers, and a row costs its place. To freeze them is to note the chunks; whoever changes one that
is frozen copies that one first (copy on write).

`Keys` finds a transaction by its idempotency key. Of a key it keeps a digest of 128 bits, side by side with the number,
in buckets of plain bytes: about 40 bytes for each, whatever its length, and nothing for the garbage collector.
"""

import hashlib
from collections.abc import Iterator
from typing import Final

_BITS: Final = 10
_MASK: Final = (1 << _BITS) - 1


class _Absent:
    """A place without a row."""

    __slots__ = ()


_ABSENT: Final = _Absent()

Row = bytes | None
Chunk = list[Row | _Absent]


class Rows:
    """A map, in the order of its numbers.

    A new number is nearly always above all others; one that is not may cost as much as there are chunks.
    """

    def __init__(self) -> None:
        self._chunks: dict[int, Chunk] = {}
        self._live: dict[int, int] = {}
        """By chunk: how many rows it has."""
        self._frozen: set[int] = set()
        """Chunks that somebody else looks at."""
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, number: int) -> bool:
        return not isinstance(self._place(number), _Absent)

    def _place(self, number: int) -> Row | _Absent:
        chunk = self._chunks.get(number >> _BITS)
        at = number & _MASK
        return _ABSENT if chunk is None or at >= len(chunk) else chunk[at]

    def get(self, number: int) -> Row:
        """The row; None also where there is none."""
        row = self._place(number)
        return None if isinstance(row, _Absent) else row

    def __getitem__(self, number: int) -> Row:
        row = self._place(number)
        if isinstance(row, _Absent):
            raise KeyError(number)
        return row

    def __setitem__(self, number: int, row: Row) -> None:
        place, at = number >> _BITS, number & _MASK
        chunk = self._chunks.get(place)
        if chunk is None or place in self._frozen:
            chunk = self._own(place)
        if at >= len(chunk):
            chunk.extend([_ABSENT] * (at - len(chunk)))
            chunk.append(row)
        else:
            if not isinstance(chunk[at], _Absent):
                chunk[at] = row
                return
            chunk[at] = row
        self._live[place] += 1
        self._count += 1

    def __delitem__(self, number: int) -> None:
        if number not in self:
            raise KeyError(number)
        place = number >> _BITS
        self._count -= 1
        self._live[place] -= 1
        if not self._live[place]:
            del self._chunks[place], self._live[place]
            self._frozen.discard(place)
            return
        chunk = self._own(place)
        chunk[number & _MASK] = _ABSENT
        while isinstance(chunk[-1], _Absent):
            chunk.pop()

    def _own(self, place: int) -> Chunk:
        """The chunk, to be changed."""
        chunk = self._chunks.get(place)
        if chunk is None:
            ascends = place > next(reversed(self._chunks), -1)
            self._live[place] = 0
            chunk = self._chunks[place] = []
            if not ascends:
                self._chunks = dict(sorted(self._chunks.items()))
        elif place in self._frozen:
            self._frozen.discard(place)
            chunk = self._chunks[place] = chunk.copy()
        return chunk

    def __iter__(self) -> Iterator[int]:
        return (number for number, _row in self.items())

    def items(self) -> Iterator[tuple[int, Row]]:
        """Numbers and rows, ascending."""
        for place, chunk in self._chunks.items():
            yield from rows_of(place, chunk)

    def __reversed__(self) -> Iterator[int]:
        for place, chunk in reversed(self._chunks.items()):
            for at in range(len(chunk) - 1, -1, -1):
                if not isinstance(chunk[at], _Absent):
                    yield (place << _BITS) + at

    @property
    def highest(self) -> int:
        """The last number, -1 if there is none."""
        place = next(reversed(self._chunks), None)
        return (
            -1 if place is None else (place << _BITS) + len(self._chunks[place]) - 1
        )  # no chunk ends with an absent one

    def freeze(self) -> list[tuple[int, Chunk]]:
        """The chunks as they are now; they will not change. `rows_of` reads them."""
        self._frozen = set(self._chunks)
        return list(self._chunks.items())

    def copy(self) -> "Rows":
        """An independent map."""
        self._frozen = set(self._chunks)
        copy = Rows()
        copy._chunks, copy._live = dict(self._chunks), dict(self._live)
        copy._frozen, copy._count = set(self._chunks), self._count
        return copy


def rows_of(place: int, chunk: Chunk) -> Iterator[tuple[int, Row]]:
    """Numbers and rows of a chunk, ascending."""
    first = place << _BITS
    for at, row in enumerate(chunk):
        if not isinstance(row, _Absent):
            yield first + at, row


_DIGEST_BYTES: Final = 16
_BUCKET_BYTES: Final = 2
_NUMBER_BYTES: Final = 14
_SLOT_BYTES: Final = _DIGEST_BYTES - _BUCKET_BYTES + _NUMBER_BYTES


class Keys:
    """Numbers of transactions by idempotency key."""

    def __init__(self) -> None:
        self._buckets: dict[bytes, bytes] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, key: str) -> bool:
        return self.get(key) is not None

    def get(self, key: str) -> int | None:
        """The number, None if the key is not known."""
        place, rest = _digest(key)
        bucket = self._buckets.get(place, b"")
        at = _find(bucket, rest)
        return None if at < 0 else int.from_bytes(bucket[at + len(rest) : at + _SLOT_BYTES], "little")

    def __setitem__(self, key: str, number: int) -> None:
        place, rest = _digest(key)
        bucket = self._buckets.get(place, b"")
        at = _find(bucket, rest)
        slot = rest + number.to_bytes(_NUMBER_BYTES, "little")
        if at < 0:
            self._buckets[place] = bucket + slot
            self._count += 1
        else:
            self._buckets[place] = bucket[:at] + slot + bucket[at + _SLOT_BYTES :]

    def __delitem__(self, key: str) -> None:
        place, rest = _digest(key)
        bucket = self._buckets.get(place, b"")
        at = _find(bucket, rest)
        if at < 0:
            raise KeyError(key)
        self._count -= 1
        left = bucket[:at] + bucket[at + _SLOT_BYTES :]
        if left:
            self._buckets[place] = left
        else:
            del self._buckets[place]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Keys):
            return NotImplemented
        return self._as_sets() == other._as_sets()

    __hash__ = None  # type: ignore[assignment]  # it changes

    def _as_sets(self) -> dict[bytes, set[bytes]]:
        return {
            place: {bucket[at : at + _SLOT_BYTES] for at in range(0, len(bucket), _SLOT_BYTES)}
            for place, bucket in self._buckets.items()
        }

    def copy(self) -> "Keys":
        """An independent index."""
        copy = Keys()
        copy._buckets, copy._count = dict(self._buckets), self._count
        return copy


def _digest(key: str) -> tuple[bytes, bytes]:
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=_DIGEST_BYTES).digest()
    return digest[:_BUCKET_BYTES], digest[_BUCKET_BYTES:]


def _find(bucket: bytes, rest: bytes) -> int:
    """Where the slot of a digest begins, -1 if there is none."""
    at = bucket.find(rest)
    while at >= 0 and at % _SLOT_BYTES:
        at = bucket.find(rest, at + 1)
    return at
