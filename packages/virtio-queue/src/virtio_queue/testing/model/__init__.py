"""Both ring formats, and block requests, in plain Python: the oracle that C is compared with.

Slow and simple on purpose. Nothing outside of tests uses it.
"""

from __future__ import annotations

from virtio_queue.testing.model.block import Answer, BlockModel
from virtio_queue.testing.model.queue import ModelQueue

__all__ = ["Answer", "BlockModel", "ModelQueue"]
