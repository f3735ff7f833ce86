"""Named operations: what a payload may ask for.

A participant never runs code or SQL from the network. Its owner registers functions under names, and a payload names
one with its arguments: `{"op": "reserve", "sku": "tea", "quantity": 2}`.

    operations = Operations()

    @operations.operation("reserve")
    def reserve(branch: SqliteBranch, sku: str, quantity: int) -> dict[str, int]:
        ...
        raise Refuse("out_of_stock")

The first parameter is what the resource manager hands to the operation; the others are the payload's keys, checked
against their annotations before the operation runs. What it returns is the result that travels with the vote.

Everything that goes wrong here is a refusal, never an error of the server: nothing was prepared yet, so "no" is safe.
"""

import inspect
import logging
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

from coordinator.codec import Malformed, json_value

_log = logging.getLogger(__name__)

_REASON_LIMIT: Final = 500
"""Characters of a refusal's reason."""

F = TypeVar("F", bound=Callable[..., Any])

_CHECKED: Final[Mapping[Any, str]] = {
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    dict: "an object",
    list: "a list",
    type(None): "null",
}


class Refuse(Exception):
    """Raised by an operation to vote no.

    reason: a short word that callers can act on, such as `out_of_stock`.
    retryable: the same request, in a new transaction, might succeed without anything else being changed first.
    """

    def __init__(self, reason: str, *, retryable: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason[:_REASON_LIMIT]
        self.retryable = retryable


class Operations:
    """A registry of named operations; fill it at import time, then give it to a resource manager."""

    def __init__(self) -> None:
        self._operations: dict[str, _Operation] = {}

    def operation(self, name: str) -> Callable[[F], F]:
        """Registers the decorated function as `name`.

        Raises `TypeError` at once if a parameter has no annotation, or one that a payload cannot be checked against:
        str, int, float, bool, dict, list, Any, and unions of those with None.
        """

        def register(function: F) -> F:
            if name in self._operations:
                raise ValueError(f"operation {name!r} is registered twice")
            self._operations[name] = _Operation(name, function)
            return function

        return register

    @property
    def names(self) -> tuple[str, ...]:
        """What is registered, sorted."""
        return tuple(sorted(self._operations))

    def run(self, target: object, payload: bytes) -> Any:
        """Runs what `payload` names on `target`, and returns what it returns (an async operation: its coroutine).

        Raises `Refuse`, with a permanent reason, for a payload that no operation accepts; and whatever the operation
        raises.
        """
        try:
            arguments = json_value(payload)
        except Malformed as error:
            raise Refuse(f"bad_payload: {error}") from error
        if not isinstance(arguments, dict) or not isinstance(arguments.get("op"), str):
            raise Refuse('bad_payload: a payload is an object with "op", the name of an operation')
        name = arguments.pop("op")
        operation = self._operations.get(name)
        if operation is None:
            raise Refuse(f"unknown_operation: {name:.60}")
        operation.check(arguments)
        return operation.function(target, **arguments)


class _Operation:
    """A function, and what its arguments must be."""

    __slots__ = ("_kinds", "_required", "function", "name")

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name, self.function = name, function
        parameters = list(inspect.signature(function).parameters.values())[1:]
        hints = typing.get_type_hints(function)
        self._kinds: dict[str, tuple[Any, ...]] = {}
        self._required: set[str] = set()
        for parameter in parameters:
            if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                raise TypeError(f"operation {name!r}: parameter {parameter.name!r} cannot be given by name")
            if parameter.name not in hints or parameter.name == "op":
                raise TypeError(f"operation {name!r}: parameter {parameter.name!r} needs another name or an annotation")
            self._kinds[parameter.name] = _kinds_of(name, parameter.name, hints[parameter.name])
            if parameter.default is parameter.empty:
                self._required.add(parameter.name)

    def check(self, arguments: Mapping[str, Any]) -> None:
        """Raises `Refuse` unless the operation can be called with `arguments`."""
        for missing in sorted(self._required - arguments.keys()):
            raise Refuse(f"bad_arguments: {self.name} needs {missing}")
        for key, value in arguments.items():
            kinds = self._kinds.get(key)
            if kinds is None:
                raise Refuse(f"bad_arguments: {self.name} takes no {key:.60}")
            if not any(_is_a(value, kind) for kind in kinds):
                wanted = " or ".join(_CHECKED[kind] for kind in kinds)
                raise Refuse(f"bad_arguments: {key} of {self.name} must be {wanted}")


def _kinds_of(operation: str, parameter: str, hint: Any) -> tuple[Any, ...]:
    members = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    kinds = tuple(Any if member is Any else typing.get_origin(member) or member for member in members)
    for kind in kinds:
        if kind is not Any and kind not in _CHECKED:
            raise TypeError(f"operation {operation!r}: no payload can be checked against {parameter}: {hint}")
    return kinds


def _is_a(value: object, kind: Any) -> bool:
    if kind is Any:
        return True
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float)) if kind is float else isinstance(value, kind)


def refusal_of(error: BaseException, about: str) -> tuple[str, bool]:
    """Reason and `retryable` of a vote no, for what a branch's work raised.

    Only `Refuse` speaks for itself. Anything else is a defect of the operation: it goes to the log with its traceback,
    and callers learn no more than that.
    """
    if isinstance(error, Refuse):
        return error.reason, error.retryable
    _log.error("the work of %s failed: refused", about, exc_info=error)
    return "operation_failed", False
