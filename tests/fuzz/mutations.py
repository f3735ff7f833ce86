"""Damage: to bytes as such, and to what msgpack and JSON hold, so that it gets past the first check.

`altered` keeps a value well-formed and changes one or two places in it; `damaged` changes bytes. Both begin with
something valid, because bytes that are only random hardly ever reach what lies behind the outermost shape.
"""

import copy
import json
from typing import Any, Final

import msgpack
from hypothesis import strategies as st


def nested(depth: int) -> Any:
    """A list in a list in a list ..."""
    value: Any = None
    for _ in range(depth):
        value = [value]
    return value


ODD: Final[list[Any]] = [
    None, True, False, 0, 1, -1, 2**31, 2**63, 2**64 - 1, -(2**63), 1.5, float("nan"), float("inf"),
    "", "x", "x" * 300, "\ud800", "\0", "m-1-1", "m-1-2", "2pc", "commit", b"", b"\xff" * 40, b"\x90",
    [], [None], {}, {"a": 1}, [[]], nested(60), nested(150),
]  # fmt: skip
"""What hardly any place is made for. Deeper nesting is `damaged`'s: copying it would exhaust the stack here."""

_LENGTHS: Final = [
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\x7f",
    b"\0\0\0\0",
    b"\0\0\0\1",
    b"\x01\0\0\0",
]
_OPENINGS: Final = [
    b"\x91",
    b"\x81\xa1a",
    b"\xdd\x00\x00\xff\xff",
    b"\xc6\x7f\xff\xff\xff",
    b"[",
    b'{"a":',
    b"\xdc\xff\xff",
]


def pack(plain: Any) -> bytes:
    """msgpack, of text that is not valid UTF-8 as well."""
    packed: bytes = msgpack.packb(plain, unicode_errors="surrogatepass")
    return packed


def as_json(value: Any) -> bytes:
    """JSON text, also of what JSON lacks."""

    def plain(value: Any) -> Any:
        if isinstance(value, bytes):
            return value.decode("latin-1")
        if isinstance(value, list):
            return [plain(item) for item in value]
        return {str(key): plain(item) for key, item in value.items()} if isinstance(value, dict) else value

    return json.dumps(plain(value)).encode()


def _places(plain: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    if isinstance(plain, list):
        for index, item in enumerate(plain):
            found += _places(item, (*path, index))
    elif isinstance(plain, dict):
        for key, item in plain.items():
            found += _places(item, (*path, key))
    return found


def _inside(value: Any) -> list[Any] | None:
    """What is packed within, such as the row of a snapshot."""
    if not isinstance(value, bytes) or len(value) < 2:
        return None
    try:
        plain = msgpack.unpackb(value)
    except ValueError:
        return None
    return plain if isinstance(plain, list) else None


@st.composite
def altered(draw: st.DrawFn, plains: st.SearchStrategy[Any], odd: st.SearchStrategy[Any] | None = None) -> Any:
    """One of `plains`, well-formed, with one to three places of it changed."""
    others = st.sampled_from(ODD) if odd is None else odd | st.sampled_from(ODD)
    root = [copy.deepcopy(draw(plains))]
    for _ in range(draw(st.integers(1, 3))):
        # Containers and the places within them are equally likely at each depth, so that deep places are reached.
        paths = [path for path in _places(root) if path]
        path = draw(st.sampled_from(paths))
        parent: Any = root
        for step in path[:-1]:
            parent = parent[step]
        last = path[-1]
        value = parent[last]
        inside = _inside(value)
        what = draw(st.sampled_from(["replace", "replace", "drop", "twice", "append", "within"]))
        if inside is not None and (what == "within" or draw(st.booleans())):
            parent[last] = pack(draw(altered(st.just(inside))))
        elif what == "within" and type(value) is int:
            parent[last] = draw(
                st.sampled_from([min(value + 1, 2**64 - 1), max(0, value - 1), value << 20 & 2**63 - 1, bool(value)])
            )
        elif what == "drop" and len(path) > 1:
            del parent[last]
        elif what == "twice" and isinstance(parent, list) and parent is not root:
            parent.insert(last, copy.deepcopy(value))
        elif what == "append" and isinstance(value, list):
            value.append(copy.deepcopy(draw(others)))
        else:
            parent[last] = copy.deepcopy(draw(others))
    return root[0]


@st.composite
def damaged(draw: st.DrawFn, valid: st.SearchStrategy[bytes]) -> bytes:
    """One of `valid` with one to three pieces of damage."""
    data = bytearray(draw(valid))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        count = draw(st.sampled_from([1, 2, 4, 16, 512]))
        match draw(st.sampled_from(["bit", "byte", "cut", "drop", "again", "other", "insert", "length", "nest"])):
            case "bit" if data:
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "byte" if data:
                data[at] = draw(st.integers(0, 255))
            case "cut":
                del data[at:]
            case "drop":
                del data[at : at + count]
            case "again":
                data[at:at] = data[at : at + count]
            case "other":
                data[at:at] = draw(valid)[: count * 8]
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=8))
            case "length":
                data[at : at + 4] = draw(st.sampled_from(_LENGTHS))
            case _:
                data[at:at] = draw(st.sampled_from(_OPENINGS)) * draw(st.sampled_from([1, 3, 120, 600, 1010, 1100]))
    return bytes(data)


@st.composite
def in_parts(draw: st.DrawFn, data: bytes) -> list[bytes]:
    """`data` as a socket may hand it over."""
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=4)))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
