"""Records: values with names, which nobody can change once they are made.

A transaction takes dozens of records on every node, so what a record costs, a node costs. msgspec's structs are made,
compared and replaced in C, far cheaper than dataclasses; and those that are stored are read from bytes and checked
against their annotations in the same go (see `coordinator.codec` and `coordinator.commands`).
"""

from msgspec import Struct
from msgspec.structs import replace

__all__ = ["Record", "replace"]


class Record(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What all records are: they have slots, equality, and a hash where all that they hold has one.

    To be written `class Vote(Record, frozen=True)`: type checkers want to be told each time. What is stored has a tag
    besides, by which its bytes are known (`tag=5`), and which is never given to anything else that it is stored with.
    """
