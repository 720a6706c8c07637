"""Linux on the links of its network: `links.py KERNEL INITRD TRANSPORT LINK RING`.

Runs where unmodified kernels run, in a network namespace of its own. LINK is `tap`, `vhost`,
`passt`, or `cable`, which is between two machines of this process; RING is `split` or `packed`. The
guest pings the other end, and iperf3 moves data both ways: at first, after a pause, and after the
guest has taken its driver off the device and put it on again. Prints a JSON object.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rings
from shell import PATIENCE, power_off, ready, tell

from vmm_reference.config import MachineConfig
from vmm_reference.deviceconfig import parse_device
from vmm_reference.machine import Machine

if TYPE_CHECKING:
    from collections.abc import Callable

HERE, GUEST = "192.0.2.1", "192.0.2.2"
BYTES = 1 << 20
IPERF = "/iperf/lib/ld-linux-x86-64.so.2 --library-path /iperf/lib /iperf/iperf3"
REBIND = (
    "cd /sys/bus/virtio/drivers/virtio_net && device=$(basename virtio*) && "
    "echo $device >unbind && echo $device >bind && cd /"
)


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """A command of this machine, which has to succeed."""
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=PATIENCE)


def set_up(link: str) -> list[str]:
    """This machine's end; the devices of the guests."""
    run("ip", "link", "set", "lo", "up")
    if link == "cable":
        return ["net,socket=/run/a,peer=/run/b", "net,socket=/run/b,peer=/run/a"]
    if link == "passt":
        # Its guest has the address of an interface here, and reaches this machine as its router:
        # passt turns connections to the router's address into ones to this machine, but not pings,
        # so the address is to be one of this machine's too.
        run("ip", "link", "add", "outside", "type", "veth", "peer", "name", "away")
        for name in ("outside", "away"):
            run("ip", "link", "set", name, "up")
        run("ip", "addr", "add", f"{GUEST}/24", "dev", "outside")
        run("ip", "route", "add", "default", "via", HERE, "dev", "outside")
        run("ip", "addr", "add", f"{HERE}/32", "dev", "lo")  # now that it is a router already
        Path("/proc/sys/net/ipv4/ping_group_range").write_text("0 2147483647")
        return ["net,ports=5202:5201"]
    run("ip", "tuntap", "add", "dev", "tap0", "mode", "tap", "vnet_hdr")
    run("ip", "addr", "add", f"{HERE}/24", "dev", "tap0")
    run("ip", "link", "set", "tap0", "up")
    return [f"net,tap0{',vhost' if link == 'vhost' else ''}"]


def serve(machine: Machine) -> None:
    """Have iperf3 wait for connections in a guest."""
    tell(machine, f"{IPERF} -s -D")
    tell(machine, "until netstat -ltn | grep -q :5201; do usleep 50000; done")


def take(iperf: Callable[[str], str], arguments: str) -> bool:
    """Whether one end gets all that the other sends.

    The receiver is the one that connects, since it goes on until it has everything; a receiver that
    is connected to counts no further than the sender's end, with much still on its way.
    """
    end = json.loads(iperf(f"{arguments} -n {BYTES} -R -J"))["end"]
    sent, received = (end[f"sum_{side}"]["bytes"] for side in ("sent", "received"))
    print(f"iperf3: {sent} bytes sent, {received} received", file=sys.stderr, flush=True)
    return bool(sent >= received >= BYTES)


def traffic(machine: Machine, link: str, others: list[Machine]) -> dict[str, bool]:
    """What passes between the guest and the other end, which it finds at `HERE`."""
    tell(machine, f"ip link set eth0 up && ip addr replace {GUEST}/24 dev eth0")
    tell(machine, f"until ping -c 1 -w 1 {HERE} >/dev/null; do :; done")

    def inside(arguments: str, guest: Machine = machine) -> str:
        return tell(guest, f"{IPERF} {arguments}")

    def outside(arguments: str) -> str:
        if others:
            return inside(arguments, others[0])
        return run("iperf3", *arguments.split()).stdout

    return {
        "ping": "0% packet loss" in tell(machine, f"ping -c 2 -w 60 {HERE}"),
        "receives": take(inside, f"-c {HERE}"),
        "sends": take(outside, "-c 127.0.0.1 -p 5202" if link == "passt" else f"-c {GUEST}"),
    }


def main(kernel: str, initrd: str, transport: str, link: str, ring: str) -> None:
    """See the module."""
    rings.offer(ring)
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        machines = []
        for device in set_up(link):
            config = MachineConfig(
                kernel=kernel, initrd=initrd, cpus=1, memory="192M", transport=transport,
                cmdline="console=ttyS0 panic=-1 quiet mitigations=off",
                devices=[parse_device(device)],
            )  # fmt: skip
            machines.append(stack.enter_context(Machine(config)))
        for each in machines:
            ready(each)
        machine, *others = machines
        if others:
            tell(others[0], f"ip link set eth0 up && ip addr add {HERE}/24 dev eth0")
            serve(others[0])
        else:
            run("iperf3", "-s", "-D")
        serve(machine)
        found["ring"] = rings.negotiated(machine, "/sys/class/net/eth0/device")

        def pause() -> None:
            for each in machines:
                each.pause()
            for each in machines:
                each.resume()

        rounds: dict[str, Callable[[], object]] = {
            "first": lambda: None,
            "after a pause": pause,
            "after a reset": lambda: tell(machine, REBIND),
        }
        for name, before in rounds.items():
            start = time.monotonic()
            before()
            found[name] = traffic(machine, link, others)
            seconds = time.monotonic() - start
            print(f"{name}: {seconds:.1f} s, {found[name]}", file=sys.stderr, flush=True)
        name, counters = next(
            (name, each) for name, each in machine.metrics().items() if name.startswith("net")
        )
        print(f"{name}: {counters}", file=sys.stderr)
        found["refused"] = counters["refused"]
        for each in machines:
            power_off(each)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
