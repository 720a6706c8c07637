"""What the owner of a running machine may ask of it: power, reset, devices that come and go.

Everything here is called from the owner's threads and done on the I/O thread, where devices are
made, changed and taken away.
"""

from __future__ import annotations

import threading
import time

from vm_memory._values import evolve

from .config import parse_size
from .errors import ConfigError, HostError
from .outcome import Outcome

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    from .board import Board
    from .config import MachineConfig
    from .deviceconfig import DeviceConfig
    from .devices.blk.setup import DriveControl
    from .loop import Loop

    T = TypeVar("T")
    D = TypeVar("D", bound=DeviceConfig)

__all__ = ["Control"]


class Control:
    """The part of `Machine` by which it is controlled while it runs."""

    config: MachineConfig
    _board: Board | None
    _loop: Loop
    _standstill: threading.RLock
    _ended: Callable[[Outcome, str], None]

    def __init__(self) -> None:
        self._reset_asked = False
        self._cpus_set = threading.Event()
        self._modules_set = threading.Event()
        self._removals: dict[str, threading.Event] = {}

    def press_power_button(self) -> None:
        """Ask the guest to shut down, by ACPI; it may take its time, or ignore it.

        Raises:
            HostError: the machine does not run.
        """
        from .devices.pm import EVENT_POWER_BUTTON

        self._call(lambda board: board.tell(EVENT_POWER_BUTTON))

    def send_ctrl_alt_del(self) -> None:
        """Press those three keys, at which most guests shut down or reboot.

        Raises:
            ConfigError: the machine has no device `keyboard`.
            HostError: the machine does not run.
            TimeoutError: the guest does not fetch what is typed.
        """
        from .devices.keyboard import Controls

        for control in self._call(lambda board: [w.control for w in board.devices.values()]):
            if isinstance(control, Controls):
                control.press("leftctrl", "leftalt", "delete")
                return
        raise ConfigError("device", "keyboard", "is not in this machine")

    def reset(self) -> None:
        """Power off and on at once, whatever the guest does; its console and timeline go on."""
        self._reset_asked = True
        self._ended(Outcome.RESET, "")

    def metrics(self) -> dict[str, dict[str, int]]:
        """Counters of every device, by the device's name; what went wrong is counted by its name.

        Raises:
            HostError: the machine does not run.
        """
        return self._call(lambda board: board.metrics())

    def plug(self, device: DeviceConfig) -> str:
        """Put another device into the running machine; the guest is told.

        Needs `transport = "pci"`. The device stays in `config`, and so in snapshots and after a
        reset.

        Returns:
            The device's name.

        Raises:
            ConfigError: it can't be in this machine.
            HostError: its backend can't be had, or the machine does not run.
        """

        def plug(board: Board) -> str:
            if board.pci is None:
                hint = "make the machine with transport pci"
                raise HostError("plug", "devices on virtio-mmio are there from the start", hint)
            pinned = self._pinned(board)
            config = evolve(pinned, devices=(*pinned.devices, device))
            name = next(name for name, item in config.named_devices().items() if item is device)
            board.plug(name, device)
            self.config = config
            self.config = self._pinned(board)
            return name

        with self._standstill:
            return self._call(plug)

    def set_cpus(self, count: int, timeout: float = 30.0) -> None:
        """Let the guest have so many processors; it is told, and brings them up or gives them up.

        Needs `max_cpus` in the configuration. After a reset there are as many again.

        Args:
            count: 1 to `max_cpus`.
            timeout: seconds to wait where the guest has to give some up.

        Raises:
            ConfigError: the machine can't have so many.
            HostError: the machine does not run.
            TimeoutError: the guest has not given them up; it may still do so.
        """
        most = self.config.max_cpus
        if most is None or type(count) is not int or not 1 <= count <= most:
            rule = "needs max_cpus" if most is None else f"must be a whole number from 1 to {most}"
            raise ConfigError("cpus", count, rule)
        from .processors import set_processors

        self._cpus_set.clear()
        self._call(lambda board: set_processors(board, count))
        self._call(lambda _: self._cpus_changed())
        deadline = time.monotonic() + timeout
        while self.config.cpus != count:
            if not self._cpus_set.wait(max(deadline - time.monotonic(), 0)):
                raise TimeoutError(f"the guest still has {self.config.cpus} processors")
            self._cpus_set.clear()

    def add_memory(self, size: str | int) -> int:
        """Put a module of memory into a free slot; the guest is told, and takes it.

        Needs `max_memory` in the configuration. The module stays in `config`, and so in snapshots
        and after a reset. The guest's kernel has to be one that puts new memory to use by itself
        (`memhp_default_state=online`), or something in it that does.

        Args:
            size: a multiple of 128 MiB.

        Returns:
            The slot.

        Raises:
            ConfigError: there is no slot, or no room below `max_memory`.
            HostError: the machine does not run.
        """
        length = parse_size(size, "memory")

        def add(board: Board) -> int:
            if board.modules is None:
                raise ConfigError("memory", size, "needs max_memory")
            slot = board.modules.add(length)
            self._keep_modules()
            return slot

        with self._standstill:
            return self._call(add)

    def remove_memory(self, slot: int, timeout: float = 30.0) -> None:
        """Ask the guest to give a module up, and take it away when it has.

        Args:
            slot: of the module.
            timeout: seconds to wait; the guest may still give it up later.

        Raises:
            ConfigError: there is no module in the slot.
            HostError: the guest refuses, as it must where something in the module can't be moved;
                or the machine does not run.
            TimeoutError: the guest has not given it up.
        """

        def ask(board: Board) -> None:
            if board.modules is None:
                raise ConfigError("slot", slot, "has no module: the machine needs max_memory")
            board.modules.ask_for(slot)

        def state(board: Board) -> tuple[bool, int]:
            assert board.modules is not None
            there = board.modules.has(slot)
            self._keep_modules()
            return there, board.modules.refusals.get(slot, 0)

        self._call(ask)
        deadline = time.monotonic() + timeout
        while True:
            self._modules_set.clear()
            there, status = self._call(state)
            if not there:
                return
            if status:
                hint = "memory that the guest's kernel itself uses can't be moved"
                raise HostError(f"memory module {slot}", f"the guest refuses: {status:#x}", hint)
            if not self._modules_set.wait(max(deadline - time.monotonic(), 0)):
                raise TimeoutError(f"the guest has not given up module {slot} in {timeout:g} s")

    def _modules_changed(self) -> None:
        """The guest has given a module up, or refuses to. On the I/O thread."""
        self._keep_modules()
        self._modules_set.set()

    def _keep_modules(self) -> None:
        assert self._board is not None
        assert self._board.modules is not None
        self.config = evolve(self.config, memory_modules=self._board.modules.where())

    def resize_memory(
        self, size: str | int, name: str = "memory0", timeout: float | None = 30.0
    ) -> None:
        """Have the guest take so much of a memory device, or give back what is more.

        The size stays in `config`: after a reset the guest should have as much again.

        Args:
            size: bytes, whole blocks of the device.
            name: of the device, one of kind `memory`.
            timeout: seconds to wait until the guest has as much, or None not to wait.

        Raises:
            ConfigError: there is no such device, or it has less.
            HostError: the machine does not run.
            TimeoutError: the guest has not taken or given back all; it may still do so.
        """
        from .devices.mem import Controls, Memory

        control = self._call(lambda board: board.control(name))
        if not isinstance(control, Controls):
            raise ConfigError("device", name, "is no memory")
        control.device.changed.clear()
        with self._standstill:
            length = self._call(lambda _: control.request(size))
            self._change_device(name, lambda d: evolve(d, requested=str(length)), Memory)
        if timeout is None:
            return
        deadline = time.monotonic() + timeout
        while control.device.plugged != length:
            if not control.device.changed.wait(max(deadline - time.monotonic(), 0)):
                raise TimeoutError(f"the guest has {control.device.plugged} of {length} bytes")
            control.device.changed.clear()

    def describe_memory(self) -> dict[str, object]:
        """Memory in plain values, in bytes: `memory`, `modules` by slot, and `devices` by name.

        Raises:
            HostError: the machine does not run.
        """
        from .devices.mem import Controls

        def describe(board: Board) -> dict[str, object]:
            devices = {
                name: wiring.control.device.metrics()
                for name, wiring in board.devices.items()
                if isinstance(wiring.control, Controls)
            }
            where = () if board.modules is None else board.modules.where()
            modules = {str(slot): size for slot, (_, size) in enumerate(where) if size}
            return {"memory": self.config.memory, "modules": modules, "devices": devices}

        return self._call(describe)

    def _cpus_changed(self) -> None:
        """Keep the number of processors. On the I/O thread."""
        assert self._board is not None
        assert self._board.cpus is not None
        self.config = evolve(self.config, cpus=len(self._board.cpus.present))
        self._cpus_set.set()

    def resize_drive(self, name: str, size: int | None = None) -> None:
        """Give a drive's image another size, or let the guest know that it has one.

        Args:
            name: of the drive, such as `drive0`.
            size: in bytes; by default what the file or block device has now.

        Raises:
            ConfigError: there is no such drive.
            HostError: it can't be; nothing has changed.
        """
        self._drive(name).resize(size)

    def swap_drive(self, name: str, path: str) -> None:
        """Put another image into a drive; what was written to the old one is in it.

        Raises:
            ConfigError: there is no such drive.
            HostError: the image can't be opened, or another machine uses it; nothing has changed.
        """
        from .config import Drive

        self._drive(name).swap(path)
        self._change_device(name, lambda drive: evolve(drive, path=path), Drive)

    def _change_device(self, name: str, change: Callable[[D], D], kind: type[D]) -> None:
        """Keep what has changed of a device in the configuration."""
        wanted = self.config.named_devices()[name]

        def changed(device: Any) -> Any:
            return change(device) if device is wanted and isinstance(device, kind) else device

        self.config = evolve(
            self.config,
            drives=tuple(map(changed, self.config.drives)),
            devices=tuple(map(changed, self.config.devices)),
        )

    def _drive(self, name: str) -> DriveControl:
        from .devices.blk.setup import DriveControl

        control = self._call(lambda board: board.control(name))
        if not isinstance(control, DriveControl):
            raise ConfigError("device", name, "is no drive")
        return control

    def unplug(self, name: str, timeout: float = 30.0) -> None:
        """Ask the guest to give a device up, and take it away when it has.

        Args:
            name: of the device.
            timeout: seconds to wait; the guest may still give it up later.

        Raises:
            ConfigError: there is no such device in a slot.
            HostError: the machine does not run.
            TimeoutError: the guest has not given it up.
        """
        if (device := self.config.named_devices().get(name)) and device.reserved_memory:
            raise ConfigError("device", name, "has memory and can't be unplugged; resize it to 0")
        gone = self._removals.setdefault(name, threading.Event())
        self._call(lambda board: board.ask_for(name))
        if not gone.wait(timeout):
            raise TimeoutError(f"the guest has not given up {name} within {timeout:g} s")

    def _removed(self, name: str) -> None:
        """The guest has given a device up. On the I/O thread."""
        assert self._board is not None
        self.config = self._pinned(self._board, without=name)
        self._removals.pop(name, threading.Event()).set()

    def _pinned(self, board: Board, *, without: str = "") -> MachineConfig:
        """The configuration with the name and the slot that each device has now."""
        named = {
            name: evolve(device, id=name, slot=board.slot_number(name))
            for name, device in self.config.named_devices().items()
            if name != without
        }
        return evolve(self.config, drives=(), devices=tuple(named.values()))

    def _call(self, action: Callable[[Board], T]) -> T:
        """Do something with the board, on the I/O thread."""
        result: list[T] = []

        def run() -> None:
            if self._board is None:
                raise HostError("control", "the machine does not run", "start it first")
            result.append(action(self._board))

        try:
            self._loop.call(run)
        except RuntimeError as error:
            raise HostError("control", "the machine does not run", "start it first") from error
        return result[0]
