"""OVMF boots a disk: `ovmf.py CODE VARIABLES DISK`.

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
        firmware=code, variables=own, memory="512M", transport="pci", drives=[Drive(disk)]
    )
    with Machine(config) as machine:
        found["off"] = machine.wait(PATIENCE) is Outcome.POWER_OFF
        found["output"] = machine.console.output
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
