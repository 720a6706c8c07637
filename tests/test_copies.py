"""What two packages have in common that do not depend on each other is the same in both."""

from __future__ import annotations

from pathlib import Path

PACKAGES = Path(__file__).parent.parent / "packages"


def test_values() -> None:
    """kvm_ioctls makes its values as vm_memory does."""
    one = PACKAGES / "vm-memory" / "src" / "vm_memory" / "_values.py"
    other = PACKAGES / "kvm-ioctls" / "src" / "kvm_ioctls" / "_values.py"
    assert one.read_text() == other.read_text()
