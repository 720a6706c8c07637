"""OVMF comes to its shell, then boots a disk: `ovmf.py CODE VARIABLES DISK`.

Runs where unmodified kernels run. Prints a JSON object.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from typing import Any

from vmm_reference.config import Drive, MachineConfig
from vmm_reference.machine import Machine
from vmm_reference.outcome import Outcome

PATIENCE = 150.0


def expect(machine: Machine, pattern: str) -> str:
    """Wait for a stage, and say how long it took."""
    start = time.monotonic()
    found = machine.console.expect(pattern, PATIENCE)[0]
    print(f"{pattern}: {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
    return found


def main(code: str, variables: str, disk: str) -> None:
    """See the module."""
    found: dict[str, Any] = {}
    own = str(shutil.copy(variables, "/tmp/variables"))
    config = MachineConfig(
        firmware=code, variables=own, memory="512M", transport="pci", on_reset="exit"
    )
    with Machine(config) as machine:
        expect(machine, r"startup\.nsh")
        machine.console.send("\r")  # not to wait for it; of an Escape it would wait for the rest
        expect(machine, r"Shell>")
        machine.console.send("ver\r")
        found["shell"] = expect(machine, r"UEFI v\d+\.\d+ \(EDK II")
    config = MachineConfig(
        firmware=code, variables=own, memory="512M", transport="pci", drives=[Drive(disk)]
    )
    with Machine(config) as machine:
        for stage in ("GRUB on", "Linux version", "vmm-check: result"):
            expect(machine, stage)
        found["off"] = machine.wait(PATIENCE) is Outcome.POWER_OFF
        found["output"] = machine.console.output
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
