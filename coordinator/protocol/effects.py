"""What a state owes the world. Effects are computed anew from hard state at every asking."""

from coordinator.protocol.messages import Request
from coordinator.protocol.record import record


@record
class Send:
    """`participant` is to hear `message`, again and again until it answers."""

    participant: str
    message: Request


@record
class SetDeadline:
    """At `at` (milliseconds since 1970) the transaction counts as expired."""

    at: int


@record
class Reply:
    """The client may know the decision."""


Effect = Send | SetDeadline | Reply
