"""OVMF, UEFI's firmware for virtual machines, on whatever KVM there is."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from vmm_reference.config import MachineConfig
from vmm_reference.image.packages import fetch_package, find_tool
from vmm_reference.machine import Machine
from vmm_reference.outcome import Outcome

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(200)]

_LMA = 1 << 10  # of EFER: long mode is active
_FWAIT = r"instruction=b'\x9b"


def test_ovmf_comes_from_its_reset_vector_to_long_mode(tmp_path: Path) -> None:
    """It unpacks itself from flash and builds its page tables, with its variables below it.

    A KVM that emulates ring 0 knows no FWAIT, with which OVMF sets the floating-point unit up.
    """
    if find_tool("dpkg-deb") is None:
        pytest.skip("dpkg-deb is not here to unpack Debian's OVMF with")
    folder = fetch_package("ovmf").root / "usr/share/OVMF"
    variables = str(shutil.copy(folder / "OVMF_VARS.fd", tmp_path / "variables"))
    config = MachineConfig(
        firmware=str(folder / "OVMF_CODE.fd"), variables=variables, memory="128M", transport="pci",
        on_reset="exit",
    )  # fmt: skip
    with Machine(config) as machine:
        assert machine._board is not None
        (vcpu,) = machine._board.vm.vcpus
        deadline, efer = time.monotonic() + 150, 0
        while not efer & _LMA and time.monotonic() < deadline:
            time.sleep(0.1)
            if machine.outcome is None:
                machine.pause()
            efer = vcpu.get_sregs().efer
            if machine.outcome is None:
                machine.resume()
        assert efer & _LMA
        if machine.outcome is not None:
            assert machine.outcome is Outcome.KVM_INTERNAL_ERROR
            assert _FWAIT in machine.detail
