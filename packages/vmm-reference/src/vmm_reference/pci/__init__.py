"""PCI as the guest sees it: configuration space, BARs, MSI-X, the bus, and functions on it.

Sections are those of the PCI Local Bus Specification 3.0 unless another is named. One bus, one
function a slot, a host bridge in slot 0. Interrupts are MSI-X; INTx is there for a driver that
does not use it.
"""

from __future__ import annotations

__all__: list[str] = []
