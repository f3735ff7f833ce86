"""What a state owes the world. Effects are computed anew from hard state at every asking."""

from dataclasses import dataclass

from coordinator.protocol.messages import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Send:
    """`participant` is to hear `message`, again and again until it answers."""

    participant: str
    message: Request


@dataclass(frozen=True, slots=True, kw_only=True)
class SetDeadline:
    """At `at` (milliseconds since 1970) the transaction counts as expired."""

    at: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """The client may know the decision."""


Effect = Send | SetDeadline | Reply
