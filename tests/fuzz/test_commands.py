"""What comes out of the log: any command is understood, refused by its name, or changes nothing."""

import contextlib
from collections.abc import Callable
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.replication.log import NeedsNewer
from coordinator import codec
from coordinator.codec import Malformed
from coordinator.commands import decode_command, encode_command
from coordinator.facts import Applied, Verdict
from coordinator.ledger import Ledger
from coordinator.protocol.entries import CopyInstalled, CopyPiece, Entry, Header, TookOver
from tests.fuzz import HUNT, examples
from tests.fuzz.lives import LIFE, PLAIN, RESTORE, check_usable, content, ledger_after
from tests.fuzz.mutations import altered, damaged, nested, pack

COMMANDS = st.sampled_from(PLAIN)
ALTERED = altered(COMMANDS).map(pack)
DAMAGED = damaged(COMMANDS.map(pack))
BEFORE = st.tuples(st.just("life"), st.integers(1, len(LIFE))) | st.tuples(
    st.just("restore"), st.integers(1, len(RESTORE))
)
Decode = Callable[[bytes], tuple[Header, list[Entry]]]
Apply = Callable[[Ledger, bytes], list[Applied]]


def decodes(command: bytes, decode: Decode = decode_command) -> None:
    try:
        header, entries = decode(command)
    except Malformed as error:
        assert len(str(error)) < 500
        return
    assert decode(encode_command(header, entries)) == (header, entries)


def applies(before: tuple[str, int], command: bytes, apply: Apply = Ledger.apply) -> None:
    ledger, other = ledger_after(*before).fork(), ledger_after(*before).fork()
    held = content(ledger)
    try:
        applied = apply(ledger, command)
    except NeedsNewer as error:
        assert content(ledger) == held
        assert len(str(error)) < 1000
        with pytest.raises(NeedsNewer):
            other.apply(command)
        return
    # A piece of a copy that does not fit makes the ledger drop those before it.
    staging = any(isinstance(each.entry, CopyPiece | CopyInstalled | TookOver) for each in applied)
    if not staging and all(each.verdict is not Verdict.APPLIED for each in applied):
        assert content(ledger) == held
    other.apply(command)
    assert content(other) == content(ledger), "every replica comes to the same"
    check_usable(ledger)


@examples(100)
@given(ALTERED | DAMAGED)
def test_a_command_is_read_and_written_alike_or_malformed(command: bytes) -> None:
    decodes(command)


@examples(120)
@given(BEFORE, ALTERED | DAMAGED)
def test_a_command_is_applied_as_a_whole_or_changes_nothing(before: tuple[str, int], command: bytes) -> None:
    applies(before, command)


def test_all_of_them_are_valid_to_begin_with() -> None:
    for plain in PLAIN:
        decodes(pack(plain))
    for which, life in (("life", LIFE), ("restore", RESTORE)):
        for count, (header, entries) in enumerate(life):
            applied = ledger_after(which, count).fork().apply(encode_command(header, entries))
            unregistered = [each.verdict for each in applied if each.verdict is not Verdict.APPLIED]
            assert not unregistered, (entries, applied)
            check_usable(ledger_after(which, count).fork())


# ------------------------------------------------------------------------------------------------ known to be bad


def _without_lengths(command: bytes) -> tuple[Header, list[Entry]]:
    """Believes that four fields are there."""
    try:
        plain = msgpack.unpackb(command)
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise Malformed(f"not msgpack: {error}") from error
    if not isinstance(plain, list) or plain[0] != 1 or not isinstance(plain[3], list):
        raise Malformed("not a command")
    return decode_command(command)


def _recursing(command: bytes) -> tuple[Header, list[Entry]]:
    """Goes as deep as the bytes say."""

    def depth(plain: Any) -> int:
        return 1 + max(map(depth, plain), default=0) if isinstance(plain, list) else 0

    with contextlib.suppress(ValueError):
        depth(msgpack.unpackb(command))
    return decode_command(command)


@pytest.mark.parametrize(("decode", "error"), [(_without_lengths, IndexError), (_recursing, RecursionError)])
def test_a_careless_decoder_is_found(decode: Decode, error: type[Exception]) -> None:
    @HUNT
    @given(ALTERED | DAMAGED)
    def hunt(command: bytes) -> None:
        decodes(command, decode)

    with pytest.raises(error):
        hunt()


def _raising(ledger: Ledger, command: bytes) -> list[Applied]:
    """Trusts that a name is registered."""
    applied = ledger.apply(command)
    for each in applied:
        if each.verdict is Verdict.UNKNOWN_PARTICIPANT:
            raise KeyError(each.detail)
    return applied


def _half(ledger: Ledger, command: bytes) -> list[Applied]:
    """Changes something, and then finds that it does not understand the rest."""
    with contextlib.suppress(Malformed, msgpack.exceptions.UnpackException, ValueError):
        plain = msgpack.unpackb(command)
        ledger.floor += isinstance(plain, list) and len(plain) > 4
    return ledger.apply(command)


@pytest.mark.parametrize(("apply", "error"), [(_raising, KeyError), (_half, AssertionError)])
def test_a_ledger_that_raises_or_changes_by_halves_is_found(apply: Apply, error: type[Exception]) -> None:
    @HUNT
    @given(BEFORE, ALTERED)
    def hunt(before: tuple[str, int], command: bytes) -> None:
        applies(before, command, apply)

    with pytest.raises(error):
        hunt()


def test_what_is_wrong_with_a_deep_value_is_said_in_short() -> None:
    with pytest.raises(codec.Malformed) as caught:
        decode_command(pack([1, 1, 1, [nested(900)]]))
    assert len(str(caught.value)) < 200
