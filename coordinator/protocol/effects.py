"""What a state owes the world. Effects are computed anew from hard state at every asking."""

from coordinator.protocol.messages import Request
from coordinator.protocol.record import Record


class Send(Record, frozen=True):
    """`participant` is to hear `message`, again and again until it answers."""

    participant: str
    message: Request


class SetDeadline(Record, frozen=True):
    """At `at` (milliseconds since 1970) the transaction counts as expired."""

    at: int


class Reply(Record, frozen=True):
    """The client may know the decision."""


Effect = Send | SetDeadline | Reply
