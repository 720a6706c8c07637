"""What a machine is: plain values, checked before anything starts.

A `MachineConfig` that exists is one that can be started on a host that has the resources: every
rule that needs no KVM is enforced when it is made. The command line, the TOML file and the Python
API all end here.
"""

from __future__ import annotations

import os
import stat

from vm_memory._values import evolve, field, fields, frozen

from .deviceconfig import MAX_SLOT, DeviceConfig, device_from_mapping, to_mapping
from .devices import config_class
from .errors import ConfigError
from .layout import BLOCK, MIB, VIRTIO_MMIO_DEVICES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Any, ClassVar

__all__ = ["MAX_CPUS", "MAX_DEVICES", "Drive", "MachineConfig", "parse_size"]

MAX_CPUS = 254  # local APIC identifiers of eight bits, 255 being the broadcast
MAX_DEVICES = {"mmio": VIRTIO_MMIO_DEVICES, "pci": MAX_SLOT}
MIN_MEMORY = 16 * MIB
MAX_MEMORY = 1 << 40
MAX_FIRMWARE = 16 * MIB
MAX_MODULES = 16

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(text: str | int, field: str = "size") -> int:
    """A number of bytes from `256M`, `2G`, `4096`, or an int as it is.

    Suffixes are powers of 1024: K, M, G, T, in either case, with an optional `B` or `iB`.

    Example:
        >>> parse_size("256M"), parse_size("1GiB"), parse_size(512)
        (268435456, 1073741824, 512)

    Raises:
        ConfigError: the text is not a size.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        return text
    if isinstance(text, str):
        word = text.strip().upper().removesuffix("IB").removesuffix("B")
        digits = word.rstrip("KMGT")
        unit = word[len(digits) :]
        if digits.isascii() and digits.isdigit() and unit in _UNITS:
            return int(digits) * _UNITS[unit]
    raise ConfigError(field, text, "must be a size such as 256M or 2G")


def _tuple(value: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(value)


def _pairs(value: Iterable[Iterable[Any]]) -> tuple[Any, ...]:
    return tuple(map(tuple, value))


def _max_memory(value: str | int | None) -> int | None:
    return None if value is None else parse_size(value, "max_memory")


def _memory(value: str | int) -> int:
    return parse_size(value, "memory")


def _file(field: str, path: object, *, block: bool = False) -> str:
    """Refuse a path that is not a readable regular file (or, where allowed, a block device)."""
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise ConfigError(field, path, "must be the path of a file")
    name = os.fspath(path)
    if not isinstance(name, str):
        raise ConfigError(field, path, "must be text, not bytes")
    try:
        mode = os.stat(name).st_mode  # noqa: PTH116 - pathlib is not imported on the boot path
    except ValueError:
        raise ConfigError(field, repr(name), "must not contain a null character") from None
    except OSError as error:
        raise ConfigError(field, name, error.strerror or str(error)) from None
    if stat.S_ISDIR(mode):
        raise ConfigError(field, name, "is a directory, must be a file")
    if not (stat.S_ISREG(mode) or (block and stat.S_ISBLK(mode))):
        kinds = "a regular file or a block device" if block else "a regular file"
        raise ConfigError(field, name, f"must be {kinds}")
    if not os.access(name, os.R_OK):
        raise ConfigError(field, name, "can't be read; check its permissions")
    return name


@frozen
class Drive(DeviceConfig):
    """A disk image in raw format: a regular file or a block device, never guessed.

    Attributes:
        path: of the image.
        read_only: whether the guest may only read it; any number of machines may share it then.
        serial: up to 20 characters of ASCII that the guest reads as the disk's identity.
        queues: how many request queues the guest may use, 1 to 64; one a vCPU is what it can use.
        overlay: a folder: what the guest writes goes to a file there that ends with the machine,
            and the image is only read.
        bandwidth: limit of bytes, such as `10M` a second, as
            `vmm_reference.devices.limiter.parse_bucket` takes it; none by default.
        ops: limit of requests, likewise.
        engine: `sync` serves requests by a thread of C, one system call after the other, `io_uring`
            by one that hands the kernel many at once, `python` on the I/O thread; by default
            `python` with an overlay, else `sync`.
    """

    kind: ClassVar[str] = "drive"
    positional: ClassVar[str] = "path"
    flags: ClassVar[dict[str, str]] = {"ro": "read_only"}

    path: str
    read_only: bool = False
    serial: str = ""
    queues: int = 1
    overlay: str = ""
    bandwidth: str = ""
    ops: str = ""
    engine: str = ""

    def cloned(self, number: int) -> Drive:
        """The image itself where it is only read, else an overlay on it among temporary files."""
        if self.read_only:
            return self
        import tempfile

        return evolve(self, overlay=tempfile.gettempdir(), engine="python")

    def check(self, field: str) -> None:
        """Raise `ConfigError` unless the image exists, may be opened and has a legal size."""
        super().check(field)
        if not isinstance(self.read_only, bool):
            raise ConfigError(f"{field}.read_only", self.read_only, "must be true or false")
        serial: object = self.serial
        if not isinstance(serial, str) or not serial.isascii() or len(serial) > 20:
            raise ConfigError(f"{field}.serial", repr(serial), "must be at most 20 of ASCII")
        _whole(f"{field}.queues", self.queues, 1, 64)
        if self.bandwidth or self.ops:
            from .devices.limiter import parse_bucket

            parse_bucket(self.bandwidth, f"{field}.bandwidth")
            parse_bucket(self.ops, f"{field}.ops")
        if self.engine:
            _one_of(f"{field}.engine", self.engine, ("sync", "io_uring", "python"))
        if self.engine not in ("", "python") and self.overlay:
            raise ConfigError(f"{field}.engine", self.engine, "must be python with an overlay")
        name = _file(field, self.path, block=True)
        folder: object = self.overlay
        if not isinstance(folder, str) or (folder and not os.path.isdir(folder)):  # noqa: PTH112
            raise ConfigError(f"{field}.overlay", folder, "must be a folder")
        if folder and self.read_only:
            raise ConfigError(f"{field}.overlay", folder, "goes without read_only")
        if not self.read_only and not folder and not os.access(name, os.W_OK):
            raise ConfigError(field, name, "can't be written; add ',ro' or change its permissions")
        info = os.stat(name)  # noqa: PTH116
        if stat.S_ISREG(info.st_mode) and (info.st_size == 0 or info.st_size % 512):
            raise ConfigError(
                field,
                f"{name} ({info.st_size} bytes)",
                "must have a size that is a multiple of 512",
            )


@frozen(kw_only=True)
class MachineConfig:
    """A machine, whole: checked when it is made.

    Attributes:
        kernel: a Linux image: ELF `vmlinux` or `bzImage`; None where firmware finds one itself.
        firmware: what a PC's flash holds, such as SeaBIOS: it begins at the reset vector, in the
            place of a kernel.
        variables: a file that the firmware's flash chip keeps its variables in, such as a copy of
            `OVMF_VARS.fd`; None for firmware without one.
        initrd: an initial RAM file system, as it is, or None.
        cmdline: the kernel's command line.
        cpus: number of vCPUs, 1 to 254.
        max_cpus: how many it may have later (`Machine.set_cpus`), `cpus` to 254, or None for no
            change.
        threads: of each core, 1 to 254; a power of two unless the machine has one core.
        sockets: packages among which cores are divided, 1 to 254; where there are several, the
            cores of each are a power of two.
        memory: RAM in bytes (an int, or text such as `256M`), 16 MiB to 1 TiB, whole MiB.
        max_memory: how much there may be with modules that come later (`Machine.add_memory`), more
            than `memory` by a multiple of 128 MiB, or None for no modules.
        memory_modules: of each of 16 slots, the offset and the size of its module among that
            memory, multiples of 128 MiB, size 0 in an empty slot; kept by the running machine.
        drives: virtio-blk disks in order: /dev/vda, /dev/vdb, ...
        devices: what else there is, configurations of any kind in `vmm_reference.devices.REGISTRY`.
            An entropy device is there in any case.
        transport: how the guest finds virtio devices: `mmio`, at most 15, or `pci`, at most 31.
        shared_memory: keep RAM in a file that other processes can map: a local hand-over of the
            running machine to another VMM needs it.
        on_reset: `restart` boots the machine anew when the guest resets it, `exit` ends the run.
        protocol: how the kernel is entered: `auto`, `linux64` or `pvh`.
        kaslr: start a bzImage in its own decompressor, which randomizes the kernel's address.

    Raises:
        ConfigError: names the field, its value and the rule.
    """

    kernel: str | None = None
    firmware: str | None = None
    variables: str | None = None
    initrd: str | None = None
    cmdline: str = ""
    cpus: int = 1
    max_cpus: int | None = None
    threads: int = 1
    sockets: int = 1
    memory: int = field(default=256 * MIB, converter=_memory)
    max_memory: int | None = field(default=None, converter=_max_memory)
    memory_modules: tuple[tuple[int, int], ...] = field(default=(), converter=_pairs)
    drives: tuple[Drive, ...] = field(default=(), converter=_tuple)
    devices: tuple[DeviceConfig, ...] = field(default=(), converter=_tuple)
    transport: str = "mmio"
    shared_memory: bool = False
    on_reset: str = "restart"
    protocol: str = "auto"
    kaslr: bool = False

    def __attrs_post_init__(self) -> None:
        if self.firmware is not None:
            self._check_firmware(self.firmware)
        elif self.variables is not None:
            raise ConfigError("variables", self.variables, "need firmware, whose they are")
        elif self.kernel is None:
            raise ConfigError("kernel", "(none)", "must be given, or firmware to find one")
        else:
            _kernel(self.kernel)
        if self.initrd is not None:
            _filled("initrd", self.initrd)
        _text("cmdline", self.cmdline)
        if any(not " " <= character <= "~" for character in self.cmdline):
            raise ConfigError("cmdline", repr(self.cmdline), "must be printable ASCII on one line")
        _whole("cpus", self.cpus, 1, MAX_CPUS)
        if self.max_cpus is not None:
            _whole("max_cpus", self.max_cpus, self.cpus, MAX_CPUS)
        self._check_topology()
        if not MIN_MEMORY <= self.memory <= MAX_MEMORY:
            raise ConfigError("memory", f"{self.memory} bytes", "must be from 16M to 1T")
        if self.memory % MIB:
            raise ConfigError("memory", f"{self.memory} bytes", "must be a multiple of 1M")
        self._check_modules()
        for number, drive in enumerate(self.drives):
            if not isinstance(drive, Drive):
                raise ConfigError(f"drives[{number}]", drive, "must be a Drive")
            drive.check(f"drives[{number}]")
        for number, device in enumerate(self.devices):
            if not isinstance(device, DeviceConfig):
                raise ConfigError(f"devices[{number}]", device, "must be a device's configuration")
            device.check(f"devices[{number}]")
        _one_of("transport", self.transport, ("mmio", "pci"))
        self._check_places()
        _one_of("on_reset", self.on_reset, ("restart", "exit"))
        _one_of("protocol", self.protocol, ("auto", "linux64", "pvh"))
        for name in ("kaslr", "shared_memory"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(name, getattr(self, name), "must be true or false")

    def _check_topology(self) -> None:
        """Processors can be numbered without gaps, as KVM and ACPI have them."""
        _whole("threads", self.threads, 1, MAX_CPUS)
        _whole("sockets", self.sockets, 1, MAX_CPUS)
        cpus = self.max_cpus or self.cpus
        cores, rest = divmod(cpus, self.threads * self.sockets)
        if rest:
            rule = f"must divide the {cpus} processors"
            raise ConfigError("sockets and threads", f"{self.sockets} and {self.threads}", rule)
        if self.threads & (self.threads - 1) and cores * self.sockets > 1:
            raise ConfigError("threads", self.threads, "must be a power of two with several cores")
        if cores & (cores - 1) and self.sockets > 1:
            rule = f"must leave a power of two of cores in each, not {cores}"
            raise ConfigError("sockets", self.sockets, rule)

    def _check_modules(self) -> None:
        """Memory that may come, and modules that are there."""
        space = 0 if self.max_memory is None else self.max_memory - self.memory
        if not 0 <= space <= MAX_MEMORY or space % BLOCK:
            rule = "must be memory and a multiple of 128M, 1T at most"
            raise ConfigError("max_memory", f"{self.max_memory} bytes", rule)
        if len(self.memory_modules) > MAX_MODULES:
            rule = f"are too many; there are {MAX_MODULES} slots"
            raise ConfigError("memory_modules", len(self.memory_modules), rule)
        rule = "must be offset and size below max_memory, multiples of 128M, without overlap"
        pairs: tuple[tuple[object, ...], ...] = self.memory_modules
        for pair in pairs:
            numbers = [n for n in pair if type(n) is int and n >= 0 and not n % BLOCK]
            if not len(numbers) == len(pair) == 2 or sum(numbers) > space:
                raise ConfigError("memory_modules", pair, rule)
        end = 0
        for offset, size in sorted(pair for pair in self.memory_modules if pair[1]):
            if offset < end:
                raise ConfigError("memory_modules", (offset, size), rule)
            end = offset + size

    def _check_firmware(self, path: str) -> None:
        """Firmware fits its place, and is alone: what a boot loader takes, it could not pass on."""
        total = _rom("firmware", path)
        if self.variables is not None:
            total += _rom("variables", self.variables)
            if not os.access(self.variables, os.W_OK):
                raise ConfigError("variables", self.variables, "can't be written; give a copy")
        if total > MAX_FIRMWARE:
            raise ConfigError("firmware", f"{total} bytes with variables", "must be 16 MiB at most")
        for name in ("kernel", "initrd", "cmdline", "kaslr"):
            if value := getattr(self, name):
                raise ConfigError(name, value, "must not be given: firmware finds its own kernel")

    def named_devices(self) -> dict[str, DeviceConfig]:
        """All devices by their names, in the order in which the guest finds them."""
        every: list[DeviceConfig] = [*self.drives, *self.devices]
        if not any(device.kind == "rng" for device in every):
            every.insert(0, config_class("rng")())
        taken = {device.id for device in every}
        named: dict[str, DeviceConfig] = {}
        for device in every:
            name, number = device.id, 0
            while not name:
                name, number = f"{device.kind}{number}", number + 1
                if name in taken or name in named:
                    name = ""
            if name in named:
                raise ConfigError("devices", name, "is the id of two devices")
            named[name] = device
        return named

    def _check_places(self) -> None:
        devices = self.named_devices()
        most = MAX_DEVICES[self.transport]
        if len(devices) > most:
            other = ", 31 with transport pci" if self.transport == "mmio" else ""
            raise ConfigError("devices", len(devices), f"are too many; at most {most} fit{other}")
        slots = [device.slot for device in devices.values() if device.slot is not None]
        if self.firmware is not None and 1 in slots:
            raise ConfigError("devices", "slot 1", "has the bridge that firmware looks for")
        for slot in slots:
            if slots.count(slot) > 1:
                raise ConfigError("devices", f"slot {slot}", "is given to two devices")

    @classmethod
    def from_mapping(cls, table: Mapping[str, Any], source: str = "config") -> MachineConfig:
        """A machine from the keys of a TOML file; a key that is not known is refused.

        `drives` is an array of paths (`"root.img"`, `"root.img,ro"`) or of tables with the fields
        of `Drive`, `devices` one of tables with a `kind` and the fields of that kind.
        """
        known = [item.name for item in fields(cls)]
        for key in table:
            if key not in known:
                raise ConfigError(source, key, f"unknown key; known are {', '.join(known)}")
        values = dict(table)
        for name, kind in (("drives", "drive"), ("devices", "")):
            if name in values:
                if not isinstance(values[name], list | tuple):
                    raise ConfigError(name, values[name], "must be an array")
                values[name] = [
                    Drive.parse(item)
                    if kind and isinstance(item, str)
                    else device_from_mapping(item, f"{name}[{number}]", kind)
                    for number, item in enumerate(values[name])
                ]
        return cls(**values)

    def settled(self) -> MachineConfig:
        """The same machine with what its devices leave to chance chosen."""
        devices = tuple([device.settled() for device in self.devices])
        return self if devices == tuple(self.devices) else evolve(self, devices=devices)

    def to_mapping(self) -> dict[str, Any]:
        """The table that `from_mapping` makes the same machine of: plain values alone."""
        table = {item.name: getattr(self, item.name) for item in fields(type(self))}
        table["drives"] = [_without_kind(to_mapping(drive)) for drive in self.drives]
        table["devices"] = [to_mapping(device) for device in self.devices]
        return table


def _without_kind(table: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in table.items() if name != "kind"}


def _kernel(path: object) -> None:
    name = _file("kernel", path)
    with open(name, "rb") as image:  # noqa: PTH123
        head = image.read(1024)
    if not head.startswith(b"\x7fELF") and head[0x202:0x206] != b"HdrS":
        raise ConfigError("kernel", name, "is neither an ELF vmlinux nor a bzImage")


def _filled(field: str, path: object) -> None:
    name = _file(field, path)
    if not os.stat(name).st_size:  # noqa: PTH116
        raise ConfigError(field, name, "is empty")


def _rom(field: str, path: str) -> int:
    """The size of a file that is mapped below 4 GiB."""
    name = _file(field, path)
    size = os.stat(name).st_size  # noqa: PTH116
    if size % 4096 or not 4096 <= size <= MAX_FIRMWARE:
        rule = "must be 4 KiB to 16 MiB of whole 4 KiB pages"
        raise ConfigError(field, f"{name} ({size} bytes)", rule)
    return size


def _text(field: str, value: object) -> None:
    if not isinstance(value, str):
        raise ConfigError(field, repr(value), "must be text")


def _whole(field: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ConfigError(field, repr(value), f"must be a whole number from {low} to {high}")


def _one_of(field: str, value: object, words: tuple[str, ...]) -> None:
    if value not in words:
        raise ConfigError(field, value, f"must be one of {', '.join(words)}")
