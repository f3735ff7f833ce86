"""What can go wrong, sorted by two questions: did it happen (definite or not), and whose fault is it (the status).

Every error has a `code` that clients may branch on and that `docs/API.md` lists; the text is for people, and says what
happened, whether the thing was done, and what to do next.
"""

from typing import ClassVar


class OutlastError(Exception):
    """Base of all errors that a client is told about."""

    code: str = "internal"
    status: ClassVar[int] = 500
    title: ClassVar[str] = "Internal error"
    retry_after_s: float | None = None

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


class Definite(OutlastError):
    """The thing asked for was not done, and will not be."""


class Indefinite(OutlastError):
    """The thing asked for may have been done. Ask again with the same idempotency key to find out."""

    status = 503
    retry_after_s = 1.0


# ------------------------------------------------------------------------------------------------ the caller's


class BadRequest(Definite):
    """Not what the API speaks."""

    code, status, title = "malformed", 400, "Malformed request"


class Unauthorized(Definite):
    """No token, where one is needed."""

    code, status, title = "unauthorized", 401, "A token is needed"


class Forbidden(Definite):
    """Another token than the configured one."""

    code, status, title = "forbidden", 403, "Wrong token"


class NotFound(Definite):
    """No such thing, as far as a leader past its barrier knows."""

    code, status, title = "not_found", 404, "Not found"


class MethodNotAllowed(Definite):
    """The path exists, the method does not."""

    code, status, title = "method_not_allowed", 405, "Method not allowed"


class SlowBody(Definite):
    """The request's body did not arrive in time."""

    code, status, title = "slow_body", 408, "Slow body"


class Conflict(Definite):
    """It contradicts what is there."""

    code, status, title = "conflict", 409, "Conflict"

    def __init__(self, detail: str, *, code: str = "conflict") -> None:
        super().__init__(detail)
        self.code = code


class NotEmpty(Definite):
    """A copy can be restored only where nothing ever was."""

    code, status, title = "not_empty", 409, "Not empty"


class Gone(Definite):
    """It was there, and has been forgotten after its retention time."""

    code, status, title = "forgotten", 410, "Forgotten"


class TooLarge(Definite):
    """Above a named limit."""

    code, status, title = "too_large", 413, "Too large"


class Unprocessable(Definite):
    """Valid JSON that makes no sense."""

    code, status, title = "invalid", 422, "Invalid request"

    def __init__(self, detail: str, *, code: str = "invalid") -> None:
        super().__init__(detail)
        self.code = code


class TooMany(Definite):
    """A named limit on what is in flight or kept is reached."""

    code, status, title = "too_many", 429, "Too many"
    retry_after_s = 1.0

    def __init__(self, detail: str, *, code: str, retry_after_s: float = 1.0) -> None:
        super().__init__(detail)
        self.code = code
        self.retry_after_s = retry_after_s


# ------------------------------------------------------------------------------------------------ ours


class NoLeader(Definite):
    """Nobody leads, or this node cannot reach who does. Nothing was logged."""

    code, status, title = "no_leader", 503, "No leader"
    retry_after_s = 1.0


class NotLeader(Definite):
    """Another node leads; the request is to be passed on. Never shown to clients."""

    code, status, title = "not_leader", 503, "Not the leader"
    retry_after_s = 0.2


class NotKnownYet(Definite):
    """The question has no answer yet: the transaction is undecided, or this node cannot tell."""

    code, status, title = "not_known_yet", 503, "Not known yet"
    retry_after_s = 0.2


class NotBeforeUpgrade(Definite):
    """The cluster works at a level that does not know this yet, because a node does not: it is being upgraded."""

    code, status, title = "not_before_upgrade", 503, "Not before all nodes are upgraded"
    retry_after_s = 5.0


class AwaitingCopy(Definite):
    """A cluster that was made anew knows nothing before it has its copy, and must not act as if there were nothing."""

    code, status, title = "awaiting_copy", 503, "Waits for a copy"
    retry_after_s = 1.0


class NotRestored(Definite):
    """A restore was begun and not finished: nothing of it stays."""

    code, status, title = "not_restored", 503, "Not restored"
    retry_after_s = 1.0


class OutcomeUnknown(Indefinite):
    """The log did not say in time whether it took the entry.

    repeatable: whether the request may simply be made again, because it carries a key or needs none.
    """

    code, title = "unknown", "It is not known whether this was done"
    repeatable: bool = True


class ShuttingDown(Definite):
    """The node is on its way out and begins nothing new."""

    code, status, title = "shutting_down", 503, "Shutting down"
    retry_after_s = 0.5
