"""A VMM in a process of its own, which does what it is told: one request and one answer a line.

A request is a JSON array, the name of a method of `Host` and its arguments; the answer `{"done":
RESULT}` or `{"error": TEXT}`.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import time
import traceback
from typing import Any

import attrs
import shell
from shell import PATIENCE
from standstill import explained

from vmm_reference.config import Drive, MachineConfig
from vmm_reference.deviceconfig import parse_device
from vmm_reference.machine import Machine
from vmm_reference.state.incoming import Incoming


class Host:
    """One VMM with a machine at a time."""

    def __init__(self) -> None:
        self._machine: Machine | None = None
        self._incoming: Incoming | None = None

    @property
    def machine(self) -> Machine:
        """The machine that runs here."""
        assert self._machine is not None
        return self._machine

    def run(self, devices: list[str], fields: dict[str, Any]) -> None:
        """Start a machine, and wait for its shell."""
        config = MachineConfig(devices=[parse_device(text) for text in devices], **fields)
        self._machine = Machine(config)
        self._machine.start()
        shell.ready(self.machine)

    def restore(self, folder: str, how: str, devices: list[str], track: bool) -> None:
        """Let a machine go on from a snapshot."""
        other = [parse_device(text) for text in devices]
        self._machine = Machine.restore(folder, how, drives=[], devices=other, track=track)
        self._machine.start()

    def snapshot(self, folder: str, base: str | None, track: bool) -> None:
        """Save the machine."""
        self.machine.snapshot(folder, base=base, track=track)

    def wait_for(self, address: str, devices: list[str]) -> str:
        """Be ready for a machine; where."""
        other = [parse_device(text) for text in devices]
        self._incoming = Incoming(address, drives=[], devices=other)
        return self._incoming.address

    def receive(self) -> None:
        """Take it."""
        assert self._incoming is not None
        try:
            self._machine = self._incoming.receive(PATIENCE)
        except TimeoutError:
            raise RuntimeError(f"no machine came: {self._incoming.reports}") from None

    def migrate(self, address: str, options: dict[str, Any]) -> dict[str, Any]:
        """Give the machine away; the figures."""
        report = attrs.asdict(self.machine.migrate(address, **options))
        report["rounds"] = len(report["rounds"])
        self.close()
        return report

    def tell(self, command: str) -> str:
        """Run a command in the guest; it has to succeed. Returns what it printed."""
        return shell.tell(self.machine, command)

    def pause(self) -> None:
        """Let the guest stand still."""
        self.machine.pause()

    def resume(self) -> None:
        """Let it go on."""
        self.machine.resume()

    def terminal(self) -> bool:
        """Whether the first console carries a word each way."""
        fd = os.open(self.machine.device("console0").ends[0].path, os.O_RDWR | os.O_NOCTTY)
        os.write(fd, b"typed at hvc0\n")
        read = self.tell("read line </dev/hvc0; echo got $line; echo hello >/dev/hvc0")
        text = b""
        while b"hello\r\n" not in text:
            text += os.read(fd, 100)
        os.close(fd)
        return read == "got typed at hvc0"

    def balloon(self, size: str | int) -> int:
        """Give the balloon a size; what it has a moment later, in pages."""
        self.machine.device("balloon0").set_size(size)
        time.sleep(0.05)
        return int(self.machine.device("balloon0").balloon.actual)

    def plug(self, image: str) -> str:
        """Put another disk in."""
        return self.machine.plug(Drive(image))

    def unplug(self, name: str) -> None:
        """Take it away."""
        with explained(self.machine, f"unplug {name}"):
            self.machine.unplug(name, PATIENCE)

    def set_cpus(self, count: int) -> None:
        """Change the number of processors."""
        with explained(self.machine, f"{count} processors"):
            self.machine.set_cpus(count, PATIENCE)

    def power_off(self) -> None:
        """Let the guest end."""
        shell.power_off(self.machine)
        self.close()

    def close(self) -> None:
        """End what runs here."""
        if self._machine is not None:
            self._machine.close()
        if self._incoming is not None:
            self._incoming.close()
        self._machine = self._incoming = None


def main() -> None:
    """Until the input ends."""
    faulthandler.register(signal.SIGUSR1)  # where it hangs, for who asks
    host = Host()
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        try:
            answer = {"done": getattr(host, method)(*arguments)}
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), flush=True)
    host.close()


if __name__ == "__main__":
    main()
