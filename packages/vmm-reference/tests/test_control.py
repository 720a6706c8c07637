"""A running machine is controlled: power button, reset, devices that come, change and go."""

from collections.abc import Callable
from pathlib import Path

import pytest

from vmm_reference.config import Drive, MachineConfig
from vmm_reference.devices.rng import Entropy
from vmm_reference.errors import ConfigError, HostError
from vmm_reference.machine import Machine
from vmm_reference.outcome import Outcome
from vmm_reference.testing import tiny_kernel

pytestmark = pytest.mark.kvm

FOREVER = "PUT 's'; 1: jmp 1b"

# Does what the AML of the host bridge does when it is notified, for ever: tells which registers
# were not zero by a letter, and ejects what it is asked for.
SLOTS = """
    PUT 's'
1:  movw $0x603, %dx
    inb %dx, %al
    testb $1, %al
    jnz 4f
    testb $2, %al
    jz 1b
    movw $0x610, %dx
    inl %dx, %eax
    testl %eax, %eax
    jz 2f
    PUT 'U'
2:  movw $0x614, %dx
    inl %dx, %eax
    testl %eax, %eax
    jz 1b
    movl %eax, %ebx
    PUT 'D'
    movw $0x618, %dx
    movl %ebx, %eax
    outl %eax, %dx
    jmp 1b
4:  POWER_OFF
"""


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., MachineConfig]:
    def build(source: str, **fields: object) -> MachineConfig:
        path = tmp_path / "kernel"
        path.write_bytes(tiny_kernel(source))
        return MachineConfig(kernel=str(path), transport="pci", **fields)  # type: ignore[arg-type]

    return build


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    paths = [tmp_path / f"{number}.img" for number in range(3)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * 8192)
    return [str(path) for path in paths]


def test_devices_come_and_go(
    config: Callable[..., MachineConfig], images: list[str], tmp_path: Path
) -> None:
    """The guest is told, ejects, and the image is free again; names and slots stay what they are.

    A snapshot holds what is there now, and so does the machine after a reset.
    """
    with Machine(config(SLOTS, drives=[Drive(images[0])])) as machine:
        machine.console.expect("s", 30)
        assert machine.plug(Drive(images[1])) == "drive1"
        machine.console.expect("U", 30)
        assert machine.plug(Drive(images[2], id="spare", slot=9)) == "spare"
        machine.console.expect("U", 30)
        assert [(d.id, d.slot) for d in machine.config.devices] == [
            ("rng0", 1), ("drive0", 2), ("drive1", 3), ("spare", 9),
        ]  # fmt: skip
        with pytest.raises(HostError, match="another machine"):
            machine.plug(Drive(images[2]))
        machine.unplug("drive1")
        machine.console.expect("D", 30)
        machine.snapshot(tmp_path / "snapshot")
        machine.reset()
        machine.console.expect("s", 30)
        own = {"bus", "serial", "rtc", "i8042", "system-control", "power", "pvpanic"}
        assert set(machine.metrics()) == {"pci-hotplug"} | own | {"rng0", "drive0", "spare"}
        assert machine.metrics()["pci-hotplug"] == {"ejections": 0}
        assert machine.plug(Drive(images[1])) == "drive1"
        machine.console.expect("U", 30)
        machine.press_power_button()
        assert machine.wait(30) is Outcome.POWER_OFF
    with Machine.restore(tmp_path / "snapshot") as machine:
        assert [d.slot for d in machine.config.devices] == [1, 2, 9]
        machine.unplug("spare")
        machine.press_power_button()
        assert machine.wait(30) is Outcome.POWER_OFF


def test_a_guest_that_gives_nothing_up_keeps_it(config: Callable[..., MachineConfig]) -> None:
    """Waiting for it ends, and the device is still there; nothing unplugs what is in no slot."""
    with Machine(config(FOREVER)) as machine:
        machine.console.expect("s", 30)
        with pytest.raises(TimeoutError, match="rng0"):
            machine.unplug("rng0", timeout=0.2)
        assert "rng0" in machine.metrics()
        with pytest.raises(ConfigError, match="none of rng0"):
            machine.unplug("toaster")


def test_what_can_not_be_plugged_changes_nothing(
    config: Callable[..., MachineConfig], images: list[str]
) -> None:
    """A slot that is taken, a full bus, an image that is not there."""
    with Machine(config(FOREVER)) as machine:
        for number in range(30):
            machine.plug(Entropy(slot=31 - number))
        before = machine.config
        for device in (Entropy(), Entropy(slot=1), Drive("/no/such/image")):
            with pytest.raises(ConfigError):
                machine.plug(device)
        assert machine.config == before
        assert len(machine.metrics()) == 39
    with pytest.raises(HostError, match="does not run"):
        machine.plug(Entropy())


def test_drives_change_while_the_machine_runs(
    config: Callable[..., MachineConfig], images: list[str]
) -> None:
    """Another size and another image; a reset finds what was put in last."""
    with Machine(config(FOREVER, drives=[Drive(images[0])])) as machine:
        machine.console.expect("s", 30)
        machine.resize_drive("drive0", 1 << 20)
        assert Path(images[0]).stat().st_size == 1 << 20
        machine.swap_drive("drive0", images[1])
        assert machine.config.drives[0].path == images[1]
        machine.reset()
        machine.console.expect("s", 30)
        assert machine.device("drive0").size == 8192
        with pytest.raises(HostError, match="another machine"):
            Machine(config(FOREVER, drives=[Drive(images[1])])).start()
        for name, rule in (("rng0", "nothing that can"), ("x", "none of")):
            with pytest.raises(ConfigError, match=rule):
                machine.swap_drive(name, images[2])


def test_drives_of_all_kinds_have_limits(
    config: Callable[..., MachineConfig], images: list[str], tmp_path: Path
) -> None:
    """On every engine, from the start and while they run; an overlay leaves its image alone."""
    drives = [
        Drive(images[0], engine="python", ops="100"),
        Drive(images[1], engine="io_uring", bandwidth="1M"),
        Drive(images[2], read_only=False, overlay=str(tmp_path)),
    ]
    with Machine(config(FOREVER, drives=drives)) as machine:
        machine.console.expect("s", 30)
        for name in ("drive0", "drive1"):
            machine.device(name).limit(ops="", bandwidth="2M")
            with pytest.raises(ConfigError, match="must be SIZE"):
                machine.device(name).limit(ops="many")
        assert {"drive0", "drive1", "drive2"} <= machine.metrics().keys()
        # Its image is anybody's to read, and nothing of it can be changed while it is used.
        with pytest.raises(ConfigError, match="nothing that can"):
            machine.swap_drive("drive2", images[1])


def test_mmio_has_no_slots(config: Callable[..., MachineConfig], images: list[str]) -> None:
    """A machine without PCI says how to get one that can."""
    from attrs import evolve

    with (
        Machine(evolve(config(FOREVER), transport="mmio")) as machine,
        pytest.raises(HostError, match="transport pci"),
    ):
        machine.plug(Drive(images[0]))
