"""What an access does to memory."""

from __future__ import annotations

import enum

__all__ = ["Permissions"]


class Permissions(enum.IntFlag):
    """Reading, writing, or both.

    >>> Permissions.READ_WRITE & Permissions.WRITE == Permissions.WRITE
    True
    """

    READ = 1
    WRITE = 2
    READ_WRITE = 3
