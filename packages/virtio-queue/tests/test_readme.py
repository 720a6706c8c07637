"""The README's examples run as printed."""

from __future__ import annotations

import re
from importlib.metadata import metadata


def test_the_readmes_examples_run() -> None:
    """Its blocks of Python, one after the other, as the package's metadata has them."""
    text = metadata("virtio-queue").get_payload()  # type: ignore[attr-defined]
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
