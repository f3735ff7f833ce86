"""What is not known after a restore: the range of gids that may have come and gone after the copy was made.

A copy is the ledger as it was. What the cluster did later is lost to it: transactions that began, and decisions, of
them and of those that the copy holds undecided. Two things keep what is said after a restore from being false.

**Epochs.** They are terms of Raft, and a new cluster begins at term 1. So the ledger has a base: epoch = base + term. A
restore sets it far above the copy's epoch, and so above every epoch that the lost cluster can have begun: gids are not
given out twice, and participants do not take the new leader for an old one.

**The range.** From the oldest transaction that the copy holds undecided up to the base, a gid that is not in the table
may have been there, and be committed. Nothing is presumed of it: whoever asks is told to wait, until it is found out
from the participants (`reconcile.py`) or all of them have shown that they hold nothing of it prepared. Then the range
is closed: what was in it and is not in the table is forgotten, as by the floor, and never "aborted".

While it is open, participants are told no floor, for what they drop below it may be the only trace of a commit.
"""

from dataclasses import dataclass
from typing import Any, Final

from coordinator.codec import Malformed

EPOCH_MARGIN: Final = 100_000
"""Epochs that the lost cluster may have begun after the copy was made; an election takes one."""

EPOCH_MAX: Final = 9_999_999
"""A gid has room for seven digits."""

_SEQUENCE_BITS: Final = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class LostRange:
    """Numbers of gids from `low` to `high`, both included.

    since: when the restore was, in milliseconds since 1970.
    without: participants that are not waited for, as the operator said.
    """

    low: int
    high: int
    since: int
    without: tuple[str, ...] = ()

    def __contains__(self, number: int) -> bool:
        return self.low <= number <= self.high

    def to_plain(self) -> list[Any]:
        """As a snapshot holds it."""
        return [self.low, self.high, self.since, list(self.without)]

    @classmethod
    def of(cls, plain: Any) -> "LostRange":
        """The inverse. Raises `Malformed`."""
        low, high, since, without = plain
        if not all(type(number) is int for number in (low, high, since)) or not 0 <= low <= high:
            raise Malformed("something else where a range should be")
        if not all(type(name) is str for name in without):
            raise Malformed("something else where names should be")
        return cls(low=low, high=high, since=since, without=tuple(without))


def base_above(*epochs: int) -> int | None:
    """The base that a restore sets, above all of these epochs; None if gids have no room for it any more."""
    base = max(epochs) + EPOCH_MARGIN
    return base if base + EPOCH_MARGIN <= EPOCH_MAX else None


def last_of(epoch: int) -> int:
    """The highest number of an epoch."""
    return ((epoch + 1) << _SEQUENCE_BITS) - 1


def first_of(epoch: int) -> int:
    """The lowest number of an epoch."""
    return epoch << _SEQUENCE_BITS
