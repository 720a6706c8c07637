"""Both ring formats in plain Python: the oracle that the C walker is compared with.

Slow and simple on purpose. Nothing outside of tests uses it.
"""

from __future__ import annotations

from virtio_queue.testing.model.queue import ModelQueue

__all__ = ["ModelQueue"]
