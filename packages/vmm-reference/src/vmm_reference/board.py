"""One power-on of a machine: a KVM virtual machine, its RAM, devices and vCPUs, wired together.

Here alone devices meet descriptors, threads and KVM. Interrupts of virtio devices are eventfds
that KVM listens to, their kicks are eventfds that the I/O loop listens to: neither costs a vCPU an
exit to this process.
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack, contextmanager

from vm_memory._values import evolve

from . import layout
from .boot import Announcements, load_kernel
from .bus import Bus
from .cpu.state import CpuPolicy, set_entry_state
from .devices import factory
from .errors import ConfigError
from .legacy import LegacyDevices
from .loop import READ
from .outcome import Outcome
from .ram import MODULES, Ram, check_addresses
from .vcpu import VcpuThread
from .wiring import Wiring

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from kvm_ioctls import Kvm, Vcpu
    from kvm_ioctls.state import ClockData
    from vm_memory import GuestMemory
    from vm_memory.filler import Filler

    from .config import MachineConfig
    from .deviceconfig import DeviceConfig
    from .devices.cpus import Cpus
    from .loop import Loop
    from .modules import Modules
    from .pci.root import PciRoot
    from .state.postcopy import PostCopy
    from .state.snapshot import Restored, Tracking

__all__ = ["Board"]

_PIT_SPEAKER_DUMMY = 1
_PARK_SECONDS = 10.0


class Board:
    """A machine that is switched on, until `close`.

    Args:
        config: what to build.
        kvm: needed only while this is made.
        loop: serves kicks and runs backends.
        transmit: takes the serial port's output; each byte comes back through `transmitted`.
        room: told that the serial port takes input again after `receive` refused some.
        ended: told once, from any thread, how the guest ended and what there is to say about it.
        timeline: gets `loaded` and `first_run`.
        restored: what it is to go on from.
        incoming: memory whose content is to come, and `restore` with the rest; until `acquire`
            the machine is still somebody else's, and so are its disks.

    Raises:
        ConfigError: the kernel, its command line or the initrd can't be loaded into this machine.
        KvmError, HostError: the host refuses. Nothing is left behind in either case.
    """

    def __init__(
        self,
        config: MachineConfig,
        kvm: Kvm,
        loop: Loop,
        *,
        transmit: Callable[[bytes], None],
        room: Callable[[], None],
        ended: Callable[[Outcome, str], None],
        timeline: dict[str, float],
        restored: Restored | None = None,
        incoming: GuestMemory | None = None,
    ) -> None:
        self.incoming = incoming is not None
        self.tracking: Tracking | None = None
        self.clock: ClockData | None = None  # while the guest stands still
        self._filler: Filler | None = None  # where memory comes on demand
        self.missing: PostCopy | None = None  # where it comes from another host
        self.loop = loop
        self._ended = ended
        self._timeline = timeline
        self.ports = Bus(0x10000)
        self.mmio = Bus()
        self.announced = Announcements()
        self.devices: dict[str, Wiring] = {}
        self.pci: PciRoot | None = None
        self.cpus: Cpus | None = None  # where processors may come and go
        self.modules: Modules | None = None  # where modules of memory may come and go
        self.modules_changed: Callable[[], None] = lambda: None  # told when the guest gave one up
        self.cpus_changed: Callable[[], None] = lambda: None  # told when the guest gave one up
        self.removed: Callable[[str], object] | None = None  # told when the guest gave one up
        self.running = False
        self._vcpus: list[VcpuThread] = []
        self._mmio_devices = 0
        with ExitStack() as stack:
            policy = None
            if restored is None and incoming is None:
                policy = CpuPolicy(
                    kvm,
                    config.max_cpus or config.cpus,
                    threads=config.threads,
                    sockets=config.sockets,
                )
                check_addresses(config, policy.physical_address_bits)
            self.ram = Ram(config, restored.memory if restored else incoming)
            self.memory = self.ram.memory
            stack.callback(self.memory.close)
            if restored is not None and restored.filler is not None:
                stack.callback(restored.filler.close)
                restored.filler.start()  # before any device touches memory
                stack.callback(loop.remove, restored.filler.fileno())
            self.vm = stack.enter_context(kvm.create_vm())
            self._create_platform()
            self.legacy = LegacyDevices(self, config, transmit=transmit, room=room)
            stack.callback(self.legacy.close)
            self.serial, self.power = self.legacy.serial, self.legacy.power
            if config.max_cpus is not None:
                from .processors import add_processors

                self.cpus = add_processors(self, config.cpus, config.max_cpus)
            if MODULES in self.ram.areas:
                from .modules import Modules

                self.modules = Modules(self, config.memory_modules)
            if config.transport == "pci":
                from .pci.root import PciRoot

                self.pci = PciRoot(self, config)
            if config.firmware is not None:
                from .firmware import add_chipset

                wiring = self.devices["chipset"] = Wiring(self, "chipset")
                stack.callback(wiring.close)
                add_chipset(wiring, None if self.pci is None else self.pci.bus)
            for name, device in config.named_devices().items():
                wiring = self.devices[name] = Wiring(self, name, device.slot)
                stack.callback(wiring.close)
                wiring.control = factory(device.kind)(device, wiring)
            if config.firmware is not None:
                self._add_firmware(stack, config, restored is not None or incoming is not None)
            entry = None
            if policy is not None:
                if config.firmware is not None:
                    from .firmware import load_firmware

                    entry = load_firmware(self.memory, config.firmware, config.memory)
                else:
                    entry = load_kernel(self.memory, config, self.announced)
                timeline["loaded"] = time.monotonic()
            for number in range(config.max_cpus or config.cpus):
                vcpu = stack.enter_context(self.vm.create_vcpu(number))
                vcpu.serve_hot(self.legacy.hot)
                if policy is not None:
                    policy.apply(vcpu)
                if number == 0 and entry is not None:
                    set_entry_state(vcpu, entry)
                self._vcpus.append(
                    VcpuThread(
                        vcpu,
                        self.ports,
                        self.mmio,
                        ended,
                        self._first_run if number == 0 else None,
                    )
                )
            if restored is not None:
                self.restore(restored)
            self._resources = stack.pop_all()

    def end(self, outcome: Outcome, detail: str) -> None:
        """End the machine; from any thread. A vCPU that did it executes no further instruction."""
        self._ended(outcome, detail)
        for vcpu in self._vcpus:
            vcpu.stop()

    def parts(self) -> dict[str, Any]:
        """Devices that have state, by name, in the order in which they are restored."""
        found = self.legacy.parts()
        if self.cpus is not None:
            found["cpus"] = self.cpus
        if self.modules is not None:
            found["modules"] = self.modules.registers
        if self.pci is not None:
            found |= self.pci.parts()
        for wiring in self.devices.values():
            found |= wiring.parts
        return found

    def save(self, *, cpuid: bool = True) -> Iterator[tuple[str, object]]:
        """All states but memory, by name; the guest is paused, and this is the loop's thread.

        `cpuid` says whether those of the vCPUs have the leaves, which no guest changes.
        """
        assert self.clock is not None
        yield "vm", evolve(self.vm.save(), clock=self.clock)
        for vcpu, state in zip(self.vm.vcpus, self.vm.save_vcpus(cpuid=cpuid), strict=True):
            yield f"vcpu{vcpu.id}", state
        for name, part in self.parts().items():
            yield name, part.save()

    def restore(self, restored: Restored) -> None:
        """Become what was saved; the guest goes on with `start`."""
        self.tracking = restored.tracking
        if self.tracking is not None:
            self.ram.log_dirty_pages(on=True)
        self._filler = restored.filler
        if self._filler is not None:
            fd = self._filler.fileno()
            self.loop.add(fd, READ, lambda _: self._filled(fd))
        self.vm.restore_vcpus(restored.vcpus)
        self.vm.restore(evolve(restored.vm, clock=evolve(restored.vm.clock, flags=0)))
        self.clock = restored.vm.clock
        restored.apply(self.parts())
        for wiring in self.devices.values():
            if wiring.slot is not None:
                for queue in range(len(wiring.slot.kicks)):
                    wiring.slot.kick(queue)  # one that was on its way is in no state
        restored.close()

    def _filled(self, fd: int) -> None:
        """All memory is there, or some of it can't be had: the guest waits for it, and ends."""
        assert self._filler is not None
        self.loop.remove(fd)
        status = self._filler.status
        if status.error:
            where = f"reading the memory's file at {status.error_offset:#x}"
            self._ended(Outcome.HOST_FAILURE, f"{where}: {os.strerror(status.error)}")

    def stand_by(self) -> None:
        """Have the vCPUs' threads ready for `run`."""
        for vcpu in self._vcpus:
            vcpu.stand_by()

    def start(self) -> None:
        """Let the devices work, and the vCPUs run."""
        self.begin()
        self.run()

    def begin(self) -> None:
        """Let the devices and the clock go on."""
        self.running = True
        for wiring in self.devices.values():
            for started in wiring.starts:
                started()
        if self.clock is not None:
            from .state.snapshot import start_clock

            start_clock(self)

    def run(self) -> None:
        """Let the vCPUs run, behind `begin`; where they stand by this can't fail."""
        for vcpu in self._vcpus:
            vcpu.start()

    def stop(self) -> None:
        """End the vCPU threads and wait for them; not from one of them. Idempotent."""
        for vcpu in self._vcpus:
            vcpu.stop()
        if self._filler is not None and self._filler.status.error:
            self._filler.close()  # whoever waits for a page that never comes
        if self.missing is not None:
            self.missing.end()
        for vcpu in self._vcpus:
            vcpu.join()

    def pause(self) -> None:
        """Park all vCPUs.

        Raises:
            TimeoutError: one does not come back from the kernel; the others stay parked.
        """
        for vcpu in self._vcpus:
            vcpu.pause()
        for vcpu in self._vcpus:
            if not vcpu.wait_parked(_PARK_SECONDS):
                raise TimeoutError(f"vCPU {vcpu.vcpu.id} did not stop in {_PARK_SECONDS:g} s")
        if self.clock is None:
            for wiring in self.devices.values():
                wiring.pause()
            self.clock = self.vm.get_clock()

    def resume(self) -> None:
        """Let parked vCPUs run on; for the guest no time has passed."""
        if self.clock is not None:
            from .state.snapshot import start_clock

            start_clock(self)
            for wiring in self.devices.values():
                wiring.resume()
        for vcpu in self._vcpus:
            vcpu.resume()

    def close(self) -> None:
        """Give everything back. On the loop's thread, or after the loop has stopped."""
        self.stop()
        for wiring in reversed(self.devices.values()):
            wiring.close()
        self._resources.close()

    def threads(self) -> list[int]:
        """The vCPUs' threads, as `threading.get_native_id` has them."""
        return [vcpu.thread for vcpu in self._vcpus]

    def park(self) -> None:
        """Ask all vCPUs to stand still for a while; nothing else is touched."""
        for vcpu in self._vcpus:
            vcpu.pause()

    def unpark(self) -> None:
        """Let them run on after `park`."""
        for vcpu in self._vcpus:
            vcpu.resume()

    @contextmanager
    def between_runs(self, number: int) -> Iterator[Vcpu]:
        """A vCPU that stands still for the block, to be asked something; not from its thread.

        KVM answers nothing about one that runs until it leaves the kernel, and a guest that is idle
        or whose devices are all served there may run for minutes.

        Raises:
            TimeoutError: it does not come back from the kernel.
        """
        thread = self._vcpus[number]
        was_paused = thread.paused
        thread.pause()
        try:
            if not thread.wait_parked(_PARK_SECONDS):
                raise TimeoutError(f"vCPU {number} did not stop in {_PARK_SECONDS:g} s")
            yield thread.vcpu
        finally:
            if not was_paused:
                thread.resume()

    def release(self) -> None:
        """Give up what only one machine may hold, such as the locks of disks."""
        for wiring in self.devices.values():
            wiring.release()

    def acquire(self) -> None:
        """Take it.

        Raises:
            HostError: another machine has it; nothing is held then.
        """
        try:
            for wiring in self.devices.values():
                wiring.acquire()
        except BaseException:
            self.release()
            raise
        self.incoming = False

    def announce(self) -> None:
        """Let the network learn where the machine is now; on the loop's thread."""
        for wiring in self.devices.values():
            announce = getattr(wiring.control, "announce", None)
            if announce is not None:
                announce()

    def receive(self, data: bytes) -> int:
        """Input for the serial port; says how many bytes it took."""
        with self.ports.lock(self.serial):
            return self.serial.receive(data)

    def transmitted(self, count: int) -> None:
        """So many bytes of the serial port's output are gone. Not from within `transmit`."""
        with self.ports.lock(self.serial):
            self.serial.transmitted(count)

    def _create_platform(self) -> None:
        """Interrupt controllers, timer and RAM: what KVM itself emulates."""
        vm = self.vm
        # Memory first: once there are interrupt controllers, each slot costs some 8 ms.
        self.ram.attach(vm)
        vm.set_identity_map_addr(layout.IDENTITY_MAP)
        vm.set_tss_addr(layout.TSS)
        vm.create_irqchip()
        vm.create_pit2(_PIT_SPEAKER_DUMMY)

    def _add_firmware(self, stack: ExitStack, config: MachineConfig, restored: bool) -> None:
        """What only firmware looks for; after all that ACPI has to tell."""
        from .firmware import add_flash, add_fw_cfg, rom_ranges

        for name in ("flash", "fw-cfg"):
            wiring = self.devices[name] = Wiring(self, name)
            stack.callback(wiring.close)
        if config.variables is not None:
            address = rom_ranges(config)[1][0]
            add_flash(self.devices["flash"], config.variables, address, restored=restored)
        add_fw_cfg(self.devices["fw-cfg"], config, self.announced.build(config, address=0))

    def tell(self, event: int) -> None:
        """Raise an event of the generic event device; not from within its registers."""
        with self.ports.lock(self.power):
            self.power.tell(event)

    def remove(self, name: str) -> None:
        """Take a device away that the guest has given up. On the loop."""
        self.devices.pop(name).close()
        if self.removed is not None:
            self.removed(name)

    def slot_number(self, name: str) -> int | None:
        """The PCI slot of a device, if it is in one."""
        return getattr(self._wiring(name).slot, "number", None)

    def control(self, name: str) -> object:
        """What a device is controlled by.

        Raises:
            ConfigError: there is no such device, or nothing controls it.
        """
        control = self._wiring(name).control
        if control is None:
            raise ConfigError("device", name, "has nothing that can be controlled")
        return control

    def _wiring(self, name: str) -> Wiring:
        if name not in self.devices:
            raise ConfigError("device", name, f"is none of {', '.join(self.devices)}")
        return self.devices[name]

    def plug(self, name: str, device: DeviceConfig) -> None:
        """Put a device into a slot and tell the guest. On the loop, of a machine with PCI."""
        assert self.pci is not None
        wiring = Wiring(self, name, device.slot)
        try:
            wiring.control = factory(device.kind)(device, wiring)
            self.pci.plugged(name, wiring, device)
        except BaseException:
            wiring.close()
            raise

    def ask_for(self, name: str) -> None:
        """Ask the guest to give a device up.

        Raises:
            ConfigError: it is not there, or in no slot.
        """
        wiring = self._wiring(name)
        if self.pci is None:
            raise ConfigError("device", name, "is in no PCI slot and can't be unplugged")
        self.pci.ask_for(name, wiring)

    def metrics(self) -> dict[str, dict[str, int]]:
        """Counters of all devices by name."""
        reads, writes = self.legacy.absent()
        found = {
            "bus": {
                "unclaimed_reads": reads + self.ports.unclaimed_reads + self.mmio.unclaimed_reads,
                "unclaimed_writes": (
                    writes + self.ports.unclaimed_writes + self.mmio.unclaimed_writes
                ),
            },
            **self.legacy.metrics(),
        }
        if self.cpus is not None:
            found["cpus"] = self.cpus.metrics()
        if self.modules is not None:
            found["modules"] = self.modules.registers.metrics()
        if self.pci is not None:
            found |= self.pci.metrics()
        for name, wiring in self.devices.items():
            found[name] = wiring.metrics()
        return found

    def take_mmio_index(self) -> int:
        """The place of the next virtio-mmio device."""
        self._mmio_devices += 1
        return self._mmio_devices - 1

    def _first_run(self) -> None:
        self._timeline["first_run"] = time.monotonic()
