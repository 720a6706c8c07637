"""OVMF comes to its shell, then boots a disk: `ovmf.py CODE VARIABLES DISK`.

Runs where unmodified kernels run. Prints a JSON object.
"""

from __future__ import annotations

import json
import shutil
import sys
from typing import Any

from vmm_reference.config import Drive, MachineConfig
from vmm_reference.machine import Machine
from vmm_reference.outcome import Outcome

PATIENCE = 150.0


def main(code: str, variables: str, disk: str) -> None:
    """See the module."""
    found: dict[str, Any] = {}
    own = str(shutil.copy(variables, "/tmp/variables"))
    config = MachineConfig(
        firmware=code, variables=own, memory="512M", transport="pci", on_reset="exit"
    )
    with Machine(config) as machine:
        machine.console.expect(r"startup\.nsh", PATIENCE)
        machine.console.send("\x1b")  # not to wait for it
        machine.console.expect(r"Shell>", PATIENCE)
        machine.console.send("ver\r")
        found["shell"] = machine.console.expect(r"UEFI v\d+\.\d+ \(EDK II", PATIENCE)[0]
    config = MachineConfig(
        firmware=code, variables=own, memory="512M", transport="pci", drives=[Drive(disk)]
    )
    with Machine(config) as machine:
        found["off"] = machine.wait(PATIENCE) is Outcome.POWER_OFF
        found["output"] = machine.console.output
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
