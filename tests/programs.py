"""Programs of this host for guests that have none of its libraries."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

__all__ = ["files_of"]


def files_of(program: str) -> dict[str, Path | bytes]:
    """A program and its libraries, as `lib/...` and its name, to be run by the loader among them.

    Raises:
        FileNotFoundError: it is not here.
    """
    path = shutil.which(program)
    if path is None:
        raise FileNotFoundError(f"{program} is not here: apt-get install {program}")
    listed = subprocess.run(["ldd", path], check=True, capture_output=True, text=True).stdout
    found = re.findall(r"(/\S+) \(0x", listed)
    return {program: Path(path), **{f"lib/{Path(item).name}": Path(item) for item in found}}
