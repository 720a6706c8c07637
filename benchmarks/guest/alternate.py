"""Jobs in running guests of several VMMs, one at a time: `alternate.py SPECIFICATION`.

The specification is a JSON object:

    setup    shell text, run first in the folder where all of this happens
    vmms     command of each VMM by its name; its console is on the standard streams
    ready    shell text for the guest of each, once it has a shell
    jobs     shell text by name; what it prints is the result
    rounds   how often each job is run in each guest

Only the guest whose turn it is runs; the processes of the others are stopped. Prints a JSON object
a line for each run: vmm, job, round, seconds, the CPU seconds of the VMM's process with its guest
and its threads in the kernel, and what the job printed. How far it is goes to the standard error.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

PATIENCE = 120.0
TICK = os.sysconf("SC_CLK_TCK")


def vhost_threads() -> set[Path]:
    """All the kernel's threads that serve vhost devices."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(FileNotFoundError, ProcessLookupError):
            if (folder / "comm").read_text().startswith("vhost-"):
                found.add(folder)
    return found


class Guest:
    """A VMM whose guest has a shell on its console."""

    def __init__(self, command: str) -> None:
        self.others = vhost_threads()
        self.process = subprocess.Popen(
            ["/bin/sh", "-c", f"exec {command}"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.text = ""
        self.workers: list[Path] = []

    def send(self, text: str) -> None:
        """Type at the console."""
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode())
        self.process.stdin.flush()

    def expect(self, pattern: str) -> tuple[str, re.Match[str]]:
        """Wait for a pattern, which is of one line: what comes before it, and its match.

        A line is looked through again when more of it has come, and no text twice beside that: a
        log arrives in thousands of pieces.
        """
        assert self.process.stdout is not None
        fd = self.process.stdout.fileno()
        deadline = time.monotonic() + PATIENCE
        expression, line = re.compile(pattern), 0
        while not (match := expression.search(self.text, line)):
            line = self.text.rfind("\n") + 1
            ready, _, _ = select.select([fd], [], [], max(deadline - time.monotonic(), 0))
            data = os.read(fd, 1 << 16) if ready else b""
            if not data:
                raise RuntimeError(
                    f"{pattern!r} does not come within {PATIENCE} s: {self.text[-1000:]!r}"
                )
            self.text += data.decode(errors="replace").replace("\r", "")
        before, self.text = self.text[: match.start()], self.text[match.end() :]
        return before, match

    def tell(self, command: str) -> str:
        """Run a command; it has to succeed. Returns what it printed."""
        self.send(f"{command}\necho end-$?-end\n")
        printed, match = self.expect(r"end-(\d+)-end\n")
        if match[1] != "0":
            raise RuntimeError(f"{command!r} exits with {match[1]}: {printed[-1000:]}")
        return printed

    def cpu(self) -> float:
        """Seconds of the process and of the kernel's threads that serve it, guest included."""
        ticks = 0
        for folder in [Path(f"/proc/{self.process.pid}"), *self.workers]:
            words = (folder / "stat").read_text().rpartition(")")[2].split()
            ticks += int(words[11]) + int(words[12])
        return ticks / TICK

    def close(self) -> None:
        """End the VMM."""
        self.process.kill()
        self.process.communicate()

    def find_workers(self) -> None:
        """The kernel threads that came with this process: they serve its vhost devices."""
        self.workers = sorted(vhost_threads() - self.others)


def say(text: str) -> None:
    """Tell who waits."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """See the module."""
    wanted = json.loads(sys.argv[1])
    os.chdir(tempfile.mkdtemp(dir="/dev/shm"))
    subprocess.run(["/bin/sh", "-ec", wanted["setup"]], check=True, stdout=sys.stderr)
    guests = {}
    for name, command in wanted["vmms"].items():
        guest = guests[name] = Guest(command)
        guest.expect(r"guest:\S*# ")
        guest.send("stty -echo; PS1=\n")
        guest.tell("true")
        guest.tell(wanted["ready"][name])
        guest.find_workers()
        say(f"{name} is ready, with {len(guest.workers)} threads in the kernel")
        guest.process.send_signal(signal.SIGSTOP)
    for turn in range(wanted["rounds"]):
        for job, command in wanted["jobs"].items():
            for name, guest in guests.items():
                guest.process.send_signal(signal.SIGCONT)
                before, start = guest.cpu(), time.monotonic()
                printed = guest.tell(command)
                seconds, spent = time.monotonic() - start, guest.cpu() - before
                guest.process.send_signal(signal.SIGSTOP)
                print(json.dumps({"vmm": name, "job": job, "round": turn, "seconds": seconds,
                                  "cpu": spent, "printed": printed}), flush=True)  # fmt: skip
                say(f"round {turn} of {wanted['rounds'] - 1}, {name}, {job}: {seconds:.2f} s")
    for guest in guests.values():
        guest.close()


if __name__ == "__main__":
    main()
