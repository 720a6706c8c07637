"""The README's example runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest


def test_the_readme_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """Its first block of Python loads a kernel and prints the plan."""
    readme = Path(__file__).parent.parent / "README.md"
    if not readme.is_file():
        pytest.skip("the README does not lie beside these tests")
    code = re.search(r"```python\n(.*?)```", readme.read_text(), re.DOTALL)
    assert code is not None
    exec(code.group(1), {})
    assert "kernel segment 0" in capsys.readouterr().out
