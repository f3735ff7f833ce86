"""Records: values with names, which nobody changes once they are made.

A transaction takes dozens of records on every node, and a frozen dataclass sets each of its fields by way of a call:
that was a quarter of the time in which entries are applied. So it is the type checker that lets nobody change a record,
as if it were a frozen dataclass; at runtime it is a plain one.
"""

from dataclasses import dataclass
from typing import TypeVar, dataclass_transform

_Record = TypeVar("_Record")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def record(kind: type[_Record]) -> type[_Record]:
    """A dataclass with slots, equality and a hash. Its fields are given by name, and never assigned to."""
    # Its fields may be given in their order, too, for whoever has them as a list: see `RecordCodec`.
    return dataclass(slots=True, unsafe_hash=True)(kind)
