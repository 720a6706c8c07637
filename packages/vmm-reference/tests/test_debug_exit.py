"""The port by which a guest under test ends its machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmm_reference.config import MachineConfig
from vmm_reference.devices.debug_exit import DebugExit, ExitPort
from vmm_reference.errors import ConfigError
from vmm_reference.machine import Machine
from vmm_reference.outcome import Outcome
from vmm_reference.testing import tiny_kernel


@pytest.mark.parametrize(
    ("data", "value"), [(b"\x10", 0x10), (b"\1\2", 0x201), (b"\xff" * 4, 0xFFFFFFFF), (b"", 0)]
)
def test_a_write_is_the_end(data: bytes, value: int) -> None:
    ends: list[int] = []
    device = DebugExit(ends.append)
    device.write(0, data)
    assert ends == [value]
    assert device.read(1, 3) == bytes(3)
    assert device.metrics() == {"exits": 1, "reads": 1}


@pytest.mark.kvm
@pytest.mark.parametrize(("port", "value"), [(0x501, 0), (0xF4, 0x10), (0xF4, 0xFF)])
def test_the_guest_sets_the_exit_status(tmp_path: Path, port: int, value: int) -> None:
    """As QEMU has it: twice the value and one."""
    kernel = tmp_path / "kernel"
    kernel.write_bytes(tiny_kernel(f"OUT {port} {value}\n1: hlt\njmp 1b"))
    config = MachineConfig(kernel=str(kernel), memory="32M", devices=[ExitPort(port=port)])
    machine = Machine(config)
    with pytest.raises(ValueError, match="not ended"):
        _ = machine.status
    with machine:
        assert machine.wait(30) is Outcome.DEBUG_EXIT
        assert (machine.detail, machine.status) == (str(value), (value << 1 | 1) & 0xFF)


@pytest.mark.parametrize("text", ["port=65533", "port=x", "port=-1"])
def test_configurations_that_can_not_be(text: str) -> None:
    with pytest.raises(ConfigError, match="port"):
        ExitPort.parse(text).check("debug-exit")
