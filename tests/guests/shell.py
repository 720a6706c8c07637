"""A guest's shell on its serial console, for the scripts beside this file."""

from __future__ import annotations

from standstill import explained

from vmm_reference.machine import Machine
from vmm_reference.outcome import Outcome

__all__ = ["PATIENCE", "power_off", "ready", "tell", "until"]

PATIENCE = 200.0
"""Seconds after which nothing more is expected of a guest."""


def ready(machine: Machine, prompt: str = "guest:") -> None:
    """Wait for the shell, and have it print nothing by itself: an echo costs exits."""
    machine.console.expect(prompt, PATIENCE)
    machine.console.send("stty -echo; PS1=\n")
    tell(machine, "true")


def tell(machine: Machine, command: str) -> str:
    """Run a command; it has to succeed. Returns what it printed."""
    machine.console.send(f"{command}\necho end-$?-end\n")
    # Anchored, since every other place where the text could begin would be tried as well.
    with explained(machine, command):
        match = machine.console.expect(r"(?s)^(.*)end-(\d+)-end", PATIENCE)
    if match[2] != "0":
        raise RuntimeError(f"{command!r} exits with {match[2]}: {match[1][-500:]}")
    return match[1].strip()


def until(machine: Machine, condition: str) -> bool:
    """Wait for the guest to notice something by itself; it is never told to look."""
    return tell(machine, f"n=0; until {condition} || [ $n = 300 ]; do n=$((n+1)); usleep 100000; "
                f"done; {condition} && echo yes || echo no") == "yes"  # fmt: skip


def power_off(machine: Machine) -> None:
    """End the guest as it wants to be ended.

    Its network goes first. Linux marks all queues of virtio as broken when it shuts down (6.15, and
    stable kernels such as 6.1.192); from then on no frame that was sent is taken back. Who sends
    one more, or polls for one, may wait for just that: `start_xmit` and `virtnet_poll_cleantx`
    repeat while `virtqueue_enable_cb_delayed` fails, which does not look whether its queue is
    broken. They do so in a soft interrupt, and a processor that is needed never comes back.

    Raises:
        RuntimeError: it ended otherwise.
    """
    tell(machine, "for link in /sys/class/net/eth*; do "
         "[ ! -e $link ] || ip link set ${link##*/} down; done")  # fmt: skip
    machine.console.send("poweroff -f\n")
    with explained(machine, "power-off"):
        outcome = machine.wait(PATIENCE)
    if outcome is not Outcome.POWER_OFF:
        raise RuntimeError(f"the guest ended by {outcome}: {machine.detail}")
