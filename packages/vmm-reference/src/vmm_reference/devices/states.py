"""What the devices' `save` gives and `restore` takes: plain frozen values, each with a version.

They live apart from the devices because a boot needs none of them: this module is imported by the
first `save` or `restore`.
"""

from __future__ import annotations

from typing import Any

import attrs

from . import fields
from .fields import StateError

__all__ = [
    "BalloonState",
    "BlockState",
    "ConsoleState",
    "CpusState",
    "FlashState",
    "FwCfgState",
    "GenerationState",
    "I8042State",
    "KeyboardState",
    "LimiterState",
    "MemoryDeviceState",
    "ModulesState",
    "NetState",
    "Pm1State",
    "PmTimerState",
    "PowerState",
    "PvpanicState",
    "RtcState",
    "SerialState",
    "StateError",
    "SystemControlState",
    "VsockState",
    "WatchdogState",
]


@attrs.frozen
class SerialState:
    """A `vmm_reference.devices.serial.Serial`; registers as the 16550 names them.

    Attributes:
        received: what waits for the guest, at most 16 bytes, without the FIFO at most one.
        received_errors: for each of them the bits of LSR that it brings.
        line_errors: the error bits that LSR shows now.
        thr_empty_pending: the transmitter's interrupt is pending.
        transmitting: the host had not taken all that the guest sent.
    """

    ier: int = fields.whole(0, 0x0F)
    fcr: int = fields.whole(0, 0xFF)
    lcr: int = fields.whole(0, 0xFF)
    mcr: int = fields.whole(0, 0x1F)
    msr_delta: int = fields.whole(0, 0x0F)
    scr: int = fields.whole(0, 0xFF)
    dll: int = fields.whole(0, 0xFF)
    dlm: int = fields.whole(0, 0xFF)
    received: bytes = fields.octets(0, 16)
    received_errors: bytes = fields.octets(0, 16)
    line_errors: int = fields.whole(0, 0x1E)
    thr_empty_pending: bool = fields.flag()
    transmitting: bool = fields.flag()
    version: int = fields.version()

    def __attrs_post_init__(self) -> None:
        if len(self.received_errors) != len(self.received):
            raise StateError(
                "SerialState.received_errors", self.received_errors, "must be as long as received"
            )
        if len(self.received) > 1 and not self.fcr & 1:
            raise StateError("SerialState.received", self.received, "needs the FIFO, which is off")


@attrs.frozen
class RtcState:
    """A `vmm_reference.devices.rtc.Rtc`.

    Attributes:
        index: the register that port 0x71 shows.
        cmos: all 128 registers; those of the time count while bit SET of register B is set.
        offset: seconds by which the guest's clock is ahead of the one that the machine was given.
        updated: the last second, on the guest's clock, whose update and alarm were looked at.
        ticked: 32768ths of a second since 1970 up to which the periodic interrupt was looked at.
        bank: the register that port 0x73 shows.
        more: the 128 registers behind it.
    """

    index: int = fields.whole(0, 0x7F)
    cmos: bytes = fields.octets(128, 128)
    offset: int = fields.whole(-(1 << 62), 1 << 62)
    updated: int = fields.whole(-(1 << 62), 1 << 62)
    ticked: int = fields.whole(-(1 << 62), 1 << 62)
    bank: int = fields.whole(0, 0x7F)
    more: bytes = fields.octets(128, 128)
    version: int = fields.version()


@attrs.frozen
class FwCfgState:
    """A `vmm_reference.devices.fw_cfg.FwCfg`.

    Attributes:
        key: the item that is selected.
        offset: the byte of it that is read next.
        address_high: the upper half of a DMA access's address, until its lower half comes.
    """

    key: int = fields.whole(0, 0xFFFF)
    offset: int = fields.whole(0, 1 << 32)
    address_high: int = fields.whole(0, 0xFFFFFFFF)
    version: int = fields.version()


@attrs.frozen
class FlashState:
    """A `vmm_reference.devices.flash.Flash`, without its array.

    Attributes:
        mode: the command that reads and the next write go by.
        status: the status register.
    """

    mode: int = fields.whole(0, 0xFF)
    status: int = fields.whole(0, 0xFF)
    version: int = fields.version()


@attrs.frozen
class I8042State:
    """A `vmm_reference.devices.i8042.I8042`."""

    status: int = fields.whole(0, 0xFF)
    command_byte: int = fields.whole(0, 0xFF)
    output_port: int = fields.whole(0, 0xFF)
    output: int = fields.whole(0, 0xFF)
    expecting: int = fields.whole(0, 0xFF)
    released: bool = fields.flag()
    version: int = fields.version()


@attrs.frozen
class SystemControlState:
    """A `vmm_reference.devices.i8042.SystemControl`."""

    value: int = fields.whole(0, 0xFF)
    version: int = fields.version()


@attrs.frozen
class KeyboardState:
    """A `vmm_reference.devices.keyboard.Keyboard`.

    Attributes:
        leds: those that are lit.
        scanning: whether keys are reported.
        typematic: delay and rate, as they were set.
        expecting: the command whose data byte is to come, or 0.
        last: the byte that was fetched last.
        answers: bytes that come before what keys say.
        codes: what keys have said.
        number: of the scan code set.
        types: of the keys of set 3, by code.
    """

    leds: int = fields.whole(0, 7)
    scanning: bool = fields.flag()
    typematic: int = fields.whole(0, 0x7F)
    expecting: int = fields.whole(0, 0xFF)
    last: int = fields.whole(0, 0xFF)
    answers: bytes = fields.octets(0, 4)
    codes: bytes = fields.octets(0, 16)
    number: int = fields.whole(1, 3)
    types: bytes = fields.octets(256, 256)
    version: int = fields.version()


@attrs.frozen
class Pm1State:
    """A `vmm_reference.devices.pm1.Pm1`; status is always 0."""

    enable: int = fields.whole(0, 0xFFFF)
    control: int = fields.whole(0, 0xFFFF)
    version: int = fields.version()


@attrs.frozen
class PmTimerState:
    """A `vmm_reference.devices.pm_timer.PmTimer`: what it shows."""

    counter: int = fields.whole(0, (1 << 24) - 1)
    version: int = fields.version()


@attrs.frozen
class PvpanicState:
    """A `vmm_reference.devices.pvpanic.Pvpanic`: which events the guest may report."""

    supported: int = fields.whole(0, 0xFF)
    version: int = fields.version()


@attrs.frozen
class ModulesState:
    """A `vmm_reference.devices.modules.Modules`.

    Attributes:
        present: slot, first address and size of each module, by slots.
        up: slots of those that have come, and the guest has not looked at.
        down: of those that the guest is to give up, and has not looked at.
    """

    present: tuple[tuple[int, int, int], ...] = fields.tuples(3, 16)
    up: tuple[int, ...] = fields.numbers()
    down: tuple[int, ...] = fields.numbers()
    version: int = fields.version()


@attrs.frozen
class MemoryDeviceState:
    """A `vmm_reference.devices.mem.MemoryDevice`.

    Attributes:
        requested: bytes that the guest should have plugged.
        plugged: first block and number of blocks of each run that is plugged, by blocks.
    """

    requested: int = fields.whole(0, (1 << 63) - 1)
    plugged: tuple[tuple[int, int], ...] = fields.tuples(2, 1 << 20)
    version: int = fields.version()


@attrs.frozen
class CpusState:
    """A `vmm_reference.devices.cpus.Cpus`.

    Attributes:
        present: numbers of the processors that are there.
        up: those that have come, and the guest has not looked at.
        down: those that the guest is to give up, and has not looked at.
    """

    present: tuple[int, ...] = fields.numbers()
    up: tuple[int, ...] = fields.numbers()
    down: tuple[int, ...] = fields.numbers()
    version: int = fields.version()


@attrs.frozen
class PowerState:
    """A `vmm_reference.devices.pm.PowerManagement`."""

    events: int = fields.whole(0, 0xFF)
    wake_status: bool = fields.flag()
    version: int = fields.version()


@attrs.frozen
class BlockState:
    """A `vmm_reference.devices.blk.model.Block`.

    Attributes:
        writeback: whether writes may wait in a cache until the guest flushes.
        sectors: the disk's size; a restore needs a disk of the same.
    """

    writeback: bool = fields.flag()
    sectors: int = fields.whole(1, 1 << 55)
    version: int = fields.version()


@attrs.frozen
class LimiterState:
    """A `vmm_reference.devices.limiter.Limiter`: level and burst of each bucket, or nothing."""

    bandwidth: tuple[int, ...] = fields.levels()
    ops: tuple[int, ...] = fields.levels()
    version: int = fields.version()


def _is_limiter(state: object, field: attrs.Attribute[Any], value: object) -> None:
    good = value is None or isinstance(value, LimiterState)
    fields.require(state, field, good, value, "must be a LimiterState or None")


@attrs.frozen(kw_only=True)
class NetState:
    """A `vmm_reference.devices.net.Net`.

    Attributes:
        mac: the address now; `permanent_mac` is the one after a reset.
        mode: receive modes as `vmm_reference.devices.net_control.Control` has them.
        offloads: what the driver chose of the guest's offloads; None for all that it negotiated.
        pairs: queue pairs of the device; a restore needs as many.
        waiting: for each pair a frame that waits for buffers, or nothing.
        features: what the driver accepted, where the device is active.
    """

    mac: bytes = fields.octets(6, 6)
    permanent_mac: bytes = fields.octets(6, 6)
    mode: int = fields.whole(0, 0xFF)
    unicast: tuple[bytes, ...] = fields.many(fields.octets(6, 6), 64)
    multicast: tuple[bytes, ...] = fields.many(fields.octets(6, 6), 64)
    vlans: tuple[int, ...] = fields.many(fields.whole(0, 4095), 4096)
    offloads: int | None = fields.maybe(fields.whole(0, (1 << 64) - 1))
    pairs: int = fields.whole(1, 256)
    active_pairs: int = fields.whole(1, 256)
    announce: bool = fields.flag()
    waiting: tuple[bytes, ...] = fields.many(fields.octets(0, 12 + 65535 + 18), 256)
    features: int = fields.whole(0, (1 << 64) - 1)
    rx_limiter: LimiterState | None = attrs.field(default=None, validator=_is_limiter)
    tx_limiter: LimiterState | None = attrs.field(default=None, validator=_is_limiter)
    version: int = fields.version()

    def __attrs_post_init__(self) -> None:
        if self.active_pairs > self.pairs:
            raise StateError("NetState.active_pairs", self.active_pairs, f"at most {self.pairs}")
        if len(self.waiting) != self.pairs:
            raise StateError("NetState.waiting", len(self.waiting), f"must be {self.pairs} long")


@attrs.frozen
class VsockState:
    """A `vmm_reference.devices.vsock.model.Vsock`, without connections, which do not move.

    Attributes:
        transport_reset: the guest is to be told that they are gone.
    """

    cid: int = fields.whole(3, 0xFFFFFFFE)
    transport_reset: bool = fields.flag()
    version: int = fields.version()


@attrs.frozen(kw_only=True)
class ConsoleState:
    """A `vmm_reference.devices.console.model.Console`.

    Attributes:
        ports: how many there are; a restore needs as many.
        ready: for each, whether the driver has it.
        guest_open: for each, whether a program of the guest has it open.
        offsets: for each, how much of the buffer that is under way has gone.
        messages: what the driver is still to be told.
    """

    ports: int = fields.whole(1, 31)
    ready: tuple[bool, ...] = fields.many(fields.flag(), 31)
    guest_open: tuple[bool, ...] = fields.many(fields.flag(), 31)
    offsets: tuple[int, ...] = fields.many(fields.whole(0, 1 << 32), 31)
    columns: int = fields.whole(0, 0xFFFF)
    rows: int = fields.whole(0, 0xFFFF)
    messages: tuple[bytes, ...] = fields.many(fields.octets(8, 1024), 31 * 8)
    version: int = fields.version()

    def __attrs_post_init__(self) -> None:
        for name in ("ready", "guest_open", "offsets"):
            found = len(getattr(self, name))
            if found != self.ports:
                raise StateError(f"ConsoleState.{name}", found, f"must be {self.ports} long")


@attrs.frozen(kw_only=True)
class BalloonState:
    """A `vmm_reference.devices.balloon.Balloon`.

    Attributes:
        target: pages that should be in it.
        actual: pages that the driver says are in it.
        last: the last command of hinting that was given.
        wanted: the command of hinting that the guest should answer.
        answering: the one that it answered last.
    """

    target: int = fields.whole(0, 0xFFFFFFFF)
    actual: int = fields.whole(0, 0xFFFFFFFF)
    last: int = fields.whole(1, 0xFFFFFFFF)
    wanted: int = fields.whole(0, 0xFFFFFFFF)
    answering: int = fields.whole(0, 0xFFFFFFFF)
    version: int = fields.version()


@attrs.frozen
class GenerationState:
    """A `vmm_reference.devices.vmgenid.VmGeneration`: what the guest that was saved had."""

    identifier: bytes = fields.octets(16, 16)
    version: int = fields.version()


@attrs.frozen(kw_only=True)
class WatchdogState:
    """A `vmm_reference.devices.watchdog.Watchdog`.

    Attributes:
        count: from where it counts down.
        left: milliseconds until it is at zero, or None where it does not run.
    """

    count: int = fields.whole(10, 6000)
    left: int | None = fields.maybe(fields.whole(0, 600_000))
    version: int = fields.version()
