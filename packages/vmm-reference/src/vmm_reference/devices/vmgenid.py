"""The virtual machine generation identifier: Microsoft's specification of that name.

A random number in the guest's memory, whose address ACPI tells. It changes when the machine goes on
from a state that others may go on from too; an event says so, and a guest then makes its random
numbers and identities anew.
"""

from __future__ import annotations

import os

import attrs

from vmm_reference.acpi import aml
from vmm_reference.deviceconfig import DeviceConfig
from vmm_reference.layout import VM_GENERATION

from . import pm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import ClassVar

    from vm_memory import GuestAddress
    from vmm_reference.wiring import Wiring

    from .states import GenerationState

__all__ = ["Generation", "VmGeneration", "build"]

LENGTH = 16
_NOTIFY = "VGNT"


class VmGeneration:
    """The identifier, in the guest's memory.

    Args:
        generate: gives 16 random bytes.
        put: puts them where the guest reads them.
        notify: tells the guest that they have changed.
        moved: whether the machine comes from another host, and goes on nowhere else.

    Attributes:
        identifier: what the guest reads.
        changes: how often the guest was told of another one.
    """

    def __init__(
        self,
        generate: Callable[[], bytes],
        put: Callable[[bytes], None],
        notify: Callable[[], None],
        *,
        moved: bool = False,
    ) -> None:
        self._moved = moved
        self._generate, self._put, self._notify = generate, put, notify
        self.changes = 0
        self.identifier = generate()
        if not moved:  # the memory may be that of the machine that still runs elsewhere
            put(self.identifier)

    def metrics(self) -> dict[str, int]:
        """Changes that the guest was told of."""
        return {"changes": self.changes}

    def save(self) -> GenerationState:
        """The identifier of the guest that is saved."""
        from .states import GenerationState

        return GenerationState(self.identifier)

    def restore(self, state: GenerationState) -> None:
        """Become another than the guest that was saved, which may go on elsewhere too."""
        if self._moved:  # its memory has it
            self.identifier = state.identifier
            return
        while self.identifier == state.identifier:
            self.identifier = self._generate()
        self._put(self.identifier)
        self.changes += 1
        self._notify()


@attrs.frozen
class Generation(DeviceConfig):
    """An identifier that changes when the machine goes on from a snapshot."""

    kind: ClassVar[str] = "vmgenid"


def build(config: Generation, wiring: Wiring) -> VmGeneration:
    """The identifier, its place in ACPI, and its event."""
    place: GuestAddress = VM_GENERATION  # type: ignore[assignment]
    wiring.announce(
        lambda: aml.device(
            "VGEN",
            aml.name("_HID", aml.string("VMGENCTR")),
            aml.name("_CID", aml.string("VM_Gen_Counter")),
            aml.name("_DDN", aml.string("VM_Gen_Counter")),
            aml.name("ADDR", aml.package(aml.integer(VM_GENERATION), aml.integer(0))),
        )
    )
    wiring.announce(lambda: aml.method(_NOTIFY, 0, aml.notify("VGEN", 0x80)))
    wiring.on_event(pm.EVENT_GENERATION, _NOTIFY)
    generation = VmGeneration(
        lambda: os.urandom(LENGTH),
        lambda identifier: wiring.memory.write(place, identifier),
        lambda: wiring.raise_event(pm.EVENT_GENERATION),
        moved=wiring.incoming,
    )
    wiring.keep(generation)
    return generation
