"""The README's example runs as printed."""

from __future__ import annotations

import re
from importlib.metadata import metadata

import pytest


def test_the_readme_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """Its first block of Python, as the package's metadata has it, loads a kernel."""
    text = metadata("linux-loader").get_payload()  # type: ignore[attr-defined]
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code is not None
    exec(code.group(1), {})
    assert "kernel segment 0" in capsys.readouterr().out
