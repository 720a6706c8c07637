"""Memory in a child of fork: what it does not have there, and what it cannot rely on."""

from __future__ import annotations

import os
import weakref

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    class Forked(Protocol):
        """Something that is another thing in a child of fork."""

        def _in_child(self) -> None: ...


_watched: weakref.WeakSet[Forked] = weakref.WeakSet()
_hooked: list[bool] = []


def tell_in_children(thing: Forked) -> None:
    """Call `_in_child` of a thing, if it still lives, in every child before anything else."""
    if not _hooked:
        os.register_at_fork(after_in_child=_tell)
        _hooked.append(True)
    _watched.add(thing)


def _tell() -> None:
    for thing in list(_watched):
        thing._in_child()
