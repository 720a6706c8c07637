"""A running machine is controlled: power button, reset, devices that come, change and go."""

from collections.abc import Callable
from pathlib import Path

import pytest

from vmm_reference.api.client import ask
from vmm_reference.api.server import Control, Server
from vmm_reference.config import Drive, MachineConfig
from vmm_reference.deviceconfig import parse_device
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


def test_all_of_it_over_the_control_socket(
    config: Callable[..., MachineConfig], images: list[str], tmp_path: Path
) -> None:
    """Drives, limits, the balloon, devices and processors, by a request each."""
    path = str(tmp_path / "api")
    devices = [
        parse_device("balloon"),
        parse_device(f"net,socket={tmp_path}/a,peer={tmp_path}/b,tx_ops=5"),
    ]
    fields = {"drives": [Drive(images[0], ops="100")], "devices": devices, "max_cpus": 3}
    with Machine(config(SLOTS, **fields)) as machine, Server(path, Control(machine)):
        machine.console.expect("s", 30)
        ask(path, "PATCH", "/drives", {"drive_id": "drive0", "size": 4096})
        assert Path(images[0]).stat().st_size == 4096
        Path(images[0]).write_bytes(bytes(1024))
        ask(path, "PATCH", "/drives", {"drive_id": "drive0"})
        block = machine.device("drive0").block
        assert block.read_config(0, 8) == (2).to_bytes(8, "little")
        ask(path, "PATCH", "/drives", {"drive_id": "drive0", "path_on_host": images[1]})
        assert block.read_config(0, 8) == (16).to_bytes(8, "little")
        assert machine.config.named_devices()["drive0"].path == images[1]  # type: ignore[attr-defined]
        ask(path, "PATCH", "/limits", {"id": "drive0", "ops": "", "bandwidth": "1M/10+2M"})
        ask(path, "PATCH", "/limits", {"id": "net0", "rx_bandwidth": "10M", "tx_ops": "7"})
        ask(path, "PATCH", "/balloon", {"amount_mib": 16})
        assert ask(path, "GET", "/metrics", {})["balloon0"]["target_pages"] == 16 << 8
        added = ask(path, "PUT", "/hotplug/devices", {"device": f"drive,{images[2]},serial=new"})
        assert added == {"id": "drive1"}
        machine.console.expect("U", 30)
        assert "drive1" in ask(path, "GET", "/metrics", {})
        ask(path, "DELETE", "/hotplug/devices", {"id": "drive1"})
        assert "drive1" not in ask(path, "GET", "/metrics", {})
        ask(path, "PATCH", "/machine-config", {"vcpu_count": 3})
        assert machine.config.cpus == 3
        before = machine.config
        for method, target, body, named in (
            ("PATCH", "/drives", {"drive_id": "rng0", "size": 512}, "rng0"),
            ("PATCH", "/drives", {"drive_id": "none"}, "none"),
            ("PATCH", "/drives", {"drive_id": "drive0", "size": 100}, "512"),
            ("PATCH", "/drives", {"drive_id": "drive0", "size": 512, "path_on_host": "x"}, "size"),
            ("PATCH", "/drives", {"size": 512}, "drive_id"),
            ("PATCH", "/drives", {"drive_id": "drive0", "path_on_host": "/no/such"}, "no/such"),
            ("PATCH", "/balloon", {"amount_mib": "16"}, "amount_mib"),
            ("PATCH", "/balloon", {"amount_mib": 16, "id": "drive0"}, "drive0"),
            ("PATCH", "/balloon", {"amount_mib": 16, "id": "balloon7"}, "balloon7"),
            ("PATCH", "/limits", {"id": "drive0", "rx_ops": "1"}, "it has bandwidth, ops"),
            ("PATCH", "/limits", {"id": "rng0", "ops": "1"}, "it has none"),
            ("PATCH", "/limits", {"id": "net0", "rx_ops": "often"}, "often"),
            ("PATCH", "/limits", {"id": "net0", "rx_ops": 7}, "must be text"),
            ("PATCH", "/limits", {"id": "net0"}, "name a limit"),
            ("PUT", "/hotplug/devices", {"device": "toaster"}, "toaster"),
            ("PUT", "/hotplug/devices", {"device": f"drive,{images[1]}"}, "another machine"),
            ("DELETE", "/hotplug/devices", {"id": "toaster"}, "toaster"),
            ("PATCH", "/machine-config", {"vcpu_count": 4}, "from 1 to 3"),
        ):
            with pytest.raises(HostError, match=named):
                ask(path, method, target, body)
        assert machine.config == before
