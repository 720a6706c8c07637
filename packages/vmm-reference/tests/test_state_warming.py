"""What is imported while a guest stands still between two hosts: nothing."""

import json
import subprocess
import sys
from collections.abc import Callable

import pytest

from vmm_reference.config import MachineConfig
from vmm_reference.deviceconfig import DeviceConfig
from vmm_reference.devices.vmgenid import Generation
from vmm_reference.state.testing import COMPUTE

SOURCE = """
import json, sys
from vmm_reference import Machine, MachineConfig
from vmm_reference.state.outgoing import Outgoing
before = after = set()
pause, send = Outgoing._pause, Outgoing._send_states

def paused(self):
    global before
    before = set(sys.modules)
    pause(self)

def sent(self):
    global after
    send(self)
    after = set(sys.modules)

Outgoing._pause, Outgoing._send_states = paused, sent
with Machine(MachineConfig.from_mapping(json.loads(sys.argv[1]))) as machine:
    machine.migrate(sys.argv[2])
print(*(after - before))
"""

DESTINATION = """
import sys
from vmm_reference.board import Board
from vmm_reference.state.incoming import Incoming
restore = Board.restore
new = set()

def restored(self, states):
    before = set(sys.modules)
    restore(self, states)
    new.update(set(sys.modules) - before)

Board.restore = restored
with Incoming("tcp:127.0.0.1:0") as incoming:
    print(incoming.address, flush=True)
    with incoming.receive(60):
        print(*new)
"""


@pytest.mark.kvm
@pytest.mark.parametrize("transport", ["mmio", "pci"])
def test_no_module_is_imported_while_the_guest_stands_still(
    config: Callable[..., MachineConfig], transport: str
) -> None:
    """Neither where it was nor where it goes, in processes that have never moved one before."""
    devices: list[DeviceConfig] = [Generation()]
    machine = config(COMPUTE, transport=transport, devices=devices, cpus=2)
    with subprocess.Popen(
        [sys.executable, "-c", DESTINATION], stdout=subprocess.PIPE, text=True
    ) as there:
        assert there.stdout is not None
        address = there.stdout.readline().strip()
        table = json.dumps(machine.to_mapping())
        here = subprocess.run(
            [sys.executable, "-c", SOURCE, table, address],
            capture_output=True, text=True, check=False, timeout=100,
        )  # fmt: skip
        assert here.returncode == 0, here.stderr
        assert here.stdout.split() == []
        assert there.stdout.read().split() == []
        assert there.wait(60) == 0
