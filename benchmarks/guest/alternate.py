"""Jobs in running guests of several VMMs, one at a time: `alternate.py SPECIFICATION`.

The specification is a JSON object:

    setup    shell text, run first in the folder where all of this happens
    vmms     command of each VMM by its name; its console is on the standard streams
    ready    shell text for the guest of each, once it has a shell
    jobs     shell text by name; what it prints is the result
    rounds   how often each job is run in each guest

Only the guest whose turn it is runs; the processes of the others are stopped. Prints a JSON object
a line for each run: vmm, job, round, seconds, the CPU seconds of the VMM's process with its guest
and of the kernel's threads that serve it, and what the job printed. How far it is goes to the
standard error.
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


class Account:
    """Counts the CPU time of a process with its guest, and of the kernel's threads that serve it.

    A control group of its own, if there can be one: the kernel puts its vhost workers where the
    process is. They are no threads of it, and not to be seen from a PID namespace. Otherwise the
    process alone is counted.
    """

    def __init__(self, number: int) -> None:
        self.folder: Path | None = None
        top = Path("/sys/fs/cgroup")
        if (top / "cgroup.controllers").exists() and os.access(top, os.W_OK):
            self.folder = top / f"benchmark-{os.getpid()}-{number}"
            self.folder.mkdir()

    @property
    def whole(self) -> bool:
        """Whether the kernel's threads are counted too."""
        return self.folder is not None

    def enter(self) -> str:
        """Shell text by which a shell enters it."""
        return f"echo $$ >{self.folder}/cgroup.procs && " if self.folder else ""

    def seconds(self, pid: int) -> float:
        """Of CPU time so far."""
        if self.folder:
            usage, microseconds = (self.folder / "cpu.stat").read_text().split()[:2]
            assert usage == "usage_usec"
            return int(microseconds) / 1e6
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(words[11]) + int(words[12])) / TICK

    def close(self) -> None:
        """Remove it; its process has ended, and what that has started is about to."""
        if self.folder:
            with suppress(OSError):
                self.folder.rmdir()


class Guest:
    """A VMM whose guest has a shell on its console."""

    def __init__(self, command: str, number: int = 0) -> None:
        self.account = Account(number)
        self.process = subprocess.Popen(
            ["/bin/sh", "-c", f"{self.account.enter()}exec {command}"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.text = ""

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
        """Seconds of the VMM, guest included."""
        return self.account.seconds(self.process.pid)

    def close(self) -> None:
        """End the VMM."""
        self.process.kill()
        self.process.communicate()
        self.account.close()


def say(text: str) -> None:
    """Tell who waits."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """See the module."""
    wanted = json.loads(sys.argv[1])
    os.chdir(tempfile.mkdtemp(dir="/dev/shm"))
    subprocess.run(["/bin/sh", "-ec", wanted["setup"]], check=True, stdout=sys.stderr)
    guests: dict[str, Guest] = {}
    for name, command in wanted["vmms"].items():
        guest = guests[name] = Guest(command, len(guests))
        guest.expect(r"guest:\S*# ")
        guest.send("stty -echo; PS1= PS2=\n")
        guest.tell("true")
        guest.tell(wanted["ready"][name])
        for number, command in enumerate(wanted["jobs"].values()):
            # To type a command is work for the VMM: it is not to count as the job's.
            guest.tell(f"job{number}() {{\n{command}\n}}")
        workers = "with" if guest.account.whole else "without"
        say(f"{name} is ready; its CPU time is counted {workers} its threads in the kernel")
        guest.process.send_signal(signal.SIGSTOP)
    for turn in range(wanted["rounds"]):
        for number, job in enumerate(wanted["jobs"]):
            for name, guest in guests.items():
                guest.process.send_signal(signal.SIGCONT)
                before, start = guest.cpu(), time.monotonic()
                printed = guest.tell(f"job{number}")
                seconds, spent = time.monotonic() - start, guest.cpu() - before
                guest.process.send_signal(signal.SIGSTOP)
                print(json.dumps({"vmm": name, "job": job, "round": turn, "seconds": seconds,
                                  "cpu": spent, "printed": printed}), flush=True)  # fmt: skip
                say(f"round {turn} of {wanted['rounds'] - 1}, {name}, {job}: {seconds:.2f} s")
    for guest in guests.values():
        guest.close()


if __name__ == "__main__":
    main()
