"""A running bare-metal guest in three lines, for tests.

>>> from kvm_ioctls.testing import Guest
>>> with Guest("mov $0x3f8, %dx; mov $65, %al; out %al, %dx; hlt") as guest:
...     guest.run()
IoOut(port=1016, size=1, count=1, data=b'A')

The source is for the GNU assembler, which is called when the guest is made; a guest enters it in
real, protected or long mode, with flat segments and, in long mode, 4 GiB mapped one to one.
"""

from __future__ import annotations

from kvm_ioctls.testing.assembler import AssemblyError, assemble
from kvm_ioctls.testing.guest import CODE, STACK, Guest, Mode

__all__ = ["CODE", "STACK", "AssemblyError", "Guest", "Mode", "assemble"]
