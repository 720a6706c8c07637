"""The package's face: names load lazily, and the boot path imports nothing heavy."""

from __future__ import annotations

import subprocess
import sys

import pytest

import linux_loader


def test_every_public_name_can_be_imported() -> None:
    """Each name of __all__ exists, dir() lists them, and others are AttributeErrors."""
    for name in linux_loader.__all__:
        assert getattr(linux_loader, name) is not None
    assert set(dir(linux_loader)) == set(linux_loader.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        linux_loader.nothing  # noqa: B018


def test_the_boot_path_imports_little() -> None:
    """Loading imports no decompressor, hashing or heavy module before it needs one."""
    script = (
        "import sys, attrs; before = set(sys.modules)\n"
        "from linux_loader import load, E820Entry\n"
        "import linux_loader.linux, linux_loader.pvh, linux_loader.elf\n"
        "import linux_loader.bzimage, linux_loader.cache\n"
        "print(*sorted(set(sys.modules) - before))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    loaded = set(result.stdout.split())
    heavy = {"hashlib", "lzma", "bz2", "zlib", "lz4", "zstandard", "lzallright", "logging"}
    assert not loaded & (heavy | {"dataclasses", "pathlib", "asyncio", "tempfile", "hypothesis"})
    assert len([name for name in loaded if name.startswith("linux_loader")]) <= 21
