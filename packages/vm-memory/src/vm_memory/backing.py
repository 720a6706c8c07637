"""What guest memory is made of."""

from __future__ import annotations

import attrs

__all__ = ["Anonymous", "Backing", "Memfd"]


@attrs.frozen
class Anonymous:
    """Private memory of this process, without a file behind it.

    Pages appear when first touched, so more may be mapped than the host has.
    """


@attrs.frozen
class Memfd:
    """Memory in an anonymous file (`memfd_create`), which other processes can map too.

    All regions of a map lie one behind the other in one file. The file is sealed against
    shrinking, growing and further seals, so no process can pull a page away.

    Attributes:
        name: how the file is called in `/proc/PID/maps`.
    """

    name: str = "guest-memory"


Backing = Anonymous | Memfd
"""Any of them."""
