"""Packed rings for the devices of a machine, none of which offers them unasked."""

from __future__ import annotations

from typing import Any

from shell import tell

from virtio_queue.constants import F_RING_PACKED
from vmm_reference.machine import Machine
from vmm_reference.wiring import Wiring

__all__ = ["negotiated", "offer"]


def offer(ring: str) -> None:
    """Have all virtio devices of machines to come offer rings of that kind, `split` or `packed`."""
    assert ring in ("split", "packed")
    if ring == "split":
        return
    plug_in = Wiring.virtio

    def virtio(self: Wiring, model: Any, *arguments: Any, **options: Any) -> Any:
        model.device_features |= F_RING_PACKED
        return plug_in(self, model, *arguments, **options)

    Wiring.virtio = virtio  # type: ignore[method-assign]


def negotiated(machine: Machine, device: str) -> str:
    """Which ring a driver of Linux uses, by the folder of its device."""
    return "packed" if tell(machine, f"cut -c 35 {device}/features") == "1" else "split"
