"""What a network interface is configured by, and how it meets the machine and its link."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, ClassVar

import attrs

from vmm_reference.deviceconfig import DeviceConfig
from vmm_reference.devices.limiter import parse_bucket
from vmm_reference.errors import ConfigError, HostError

from .model import MAX_MTU, MAX_PAIRS, MIN_MTU

if TYPE_CHECKING:
    from vmm_reference.backends.datagram import DatagramLink
    from vmm_reference.backends.passt import Passt
    from vmm_reference.backends.pumps import LinkPump
    from vmm_reference.backends.tap import Tap
    from vmm_reference.backends.vhost import VhostNet
    from vmm_reference.slots import VirtioSlot
    from vmm_reference.wiring import Wiring

    from .served import ServedNet

__all__ = ["Controls", "Interface", "build"]

_LIMITS = ("rx_bandwidth", "rx_ops", "tx_bandwidth", "tx_ops")


@attrs.frozen
class Interface(DeviceConfig):
    """A network interface; without `tap` or `socket` one that needs no privileges, by passt.

    Attributes:
        tap: a tap interface of the host.
        vhost: let the host's kernel move the frames of a tap.
        queues: queue pairs, each a queue of the tap.
        socket: path of a Unix datagram socket to make, a cable to another machine.
        peer: path of the other machine's.
        ports: TCP ports of the host that passt forwards to the guest, such as `2222:22`, several
            with a space between.
        mac: the address, such as `02:00:00:00:00:01`; by default a random one.
        mtu: what the guest is told, 68 to 65535; by default nothing.
        rx_bandwidth: limit of the bytes that the guest receives, as
            `vmm_reference.devices.limiter.parse_bucket` takes it.
        rx_ops: limit of the frames that it receives.
        tx_bandwidth: limit of the bytes that it sends.
        tx_ops: limit of the frames that it sends.
    """

    kind: ClassVar[str] = "net"
    positional: ClassVar[str] = "tap"
    flags: ClassVar[dict[str, str]] = {"vhost": "vhost"}

    tap: str = ""
    vhost: bool = False
    queues: int = 1
    socket: str = ""
    peer: str = ""
    ports: str = ""
    mac: str = ""
    mtu: int | None = None
    rx_bandwidth: str = ""
    rx_ops: str = ""
    tx_bandwidth: str = ""
    tx_ops: str = ""

    def settled(self) -> Interface:
        """With an address."""
        return self if self.mac else attrs.evolve(self, mac=_random_mac().hex(":"))

    def cloned(self, number: int) -> Interface:
        """With an address, a tap or cable, and ports of the host of its own."""
        ports = [port.partition(":") for port in self.ports.split()]
        return attrs.evolve(
            self,
            mac=_counted_up(self.mac, number) if self.mac else _random_mac().hex(":"),
            tap=self.tap and f"{self.tap}-{number}",
            socket=self.socket and f"{self.socket}-{number}",
            peer=self.peer and f"{self.peer}-{number}",
            ports=" ".join(f"{int(h) + number + 1}:{g or h}" for h, _, g in ports),
        )

    def check(self, field: str) -> None:
        """Raise `ConfigError` unless it is one kind of interface, and that whole."""
        super().check(field)
        for name in ("tap", "socket", "peer", "ports", "mac"):
            value: object = getattr(self, name)
            if not isinstance(value, str) or "\0" in value:
                raise ConfigError(f"{field}.{name}", repr(value), "must be text")
        if len(self.tap) > 15 or not all(
            (c.isascii() and c.isalnum()) or c in "-_." for c in self.tap
        ):
            raise ConfigError(f"{field}.tap", self.tap, "must be the name of an interface")
        if bool(self.tap) + bool(self.socket) + bool(self.ports) > 1:
            raise ConfigError(
                field, self.tap or self.socket, "tap, socket and ports exclude another"
            )
        if bool(self.socket) != bool(self.peer):
            raise ConfigError(f"{field}.peer", self.peer or "(none)", "goes with socket")
        if self.vhost not in (True, False) or (self.vhost and not self.tap):
            raise ConfigError(
                f"{field}.vhost", self.vhost, "must be true or false, and needs a tap"
            )
        if type(self.queues) is not int or not 1 <= self.queues <= MAX_PAIRS:
            rule = f"must be a whole number from 1 to {MAX_PAIRS}"
            raise ConfigError(f"{field}.queues", self.queues, rule)
        if self.vhost and any(getattr(self, name) for name in _LIMITS):
            raise ConfigError(
                f"{field}.vhost", True, "the kernel limits no rates; use tc on the tap"
            )
        if self.queues > 1 and not self.tap:
            raise ConfigError(f"{field}.queues", self.queues, "more than one needs a tap")
        if re.fullmatch(r"(\d{1,5}(:\d{1,5})?( |$))*", self.ports) is None:
            raise ConfigError(f"{field}.ports", self.ports, "must be such as 2222:22 or 80 443")
        if self.mac and (
            re.fullmatch(r"([0-9a-fA-F]{2}:){5}[0-9a-fA-F]{2}", self.mac) is None
            or int(self.mac[:2], 16) & 1
            or not int(self.mac.replace(":", ""), 16)
        ):
            rule = "must be a unicast address such as 02:00:00:00:00:01"
            raise ConfigError(f"{field}.mac", self.mac, rule)
        mtu = self.mtu
        if mtu is not None and not (type(mtu) is int and MIN_MTU <= mtu <= MAX_MTU):
            rule = f"must be a whole number from {MIN_MTU} to {MAX_MTU}"
            raise ConfigError(f"{field}.mtu", mtu, rule)
        for name in _LIMITS:
            parse_bucket(getattr(self, name), f"{field}.{name}")


def _random_mac() -> bytes:
    """Locally administered and unicast."""
    return b"\x02" + os.urandom(5)


def _counted_up(mac: str, number: int) -> str:
    """The address so many after the next, of the same maker."""
    value = int(mac.replace(":", ""), 16)
    value = value & ~0xFFFFFF | (value + number + 1) & 0xFFFFFF
    return value.to_bytes(6, "big").hex(":")


class Controls:
    """How the owner of a machine reaches its running interface; from any thread.

    Attributes:
        net: the device, for its counters.
    """

    def __init__(self, config: Interface, net: ServedNet, slot: VirtioSlot) -> None:
        self.net = net
        self._config = config
        self._slot = slot

    def set_link(self, *, up: bool) -> None:
        """Plug the cable in or pull it, as far as the guest can see."""
        with self._slot.device.lock, self._slot.device.config_change():
            self.net.link_up = up

    def announce(self) -> None:
        """Ask the guest to tell its neighbours where it is."""
        with self._slot.device.lock, self._slot.device.config_change():
            self.net.announce()

    def limit(self, **buckets: str) -> None:
        """Change limits: `rx_bandwidth`, `rx_ops`, `tx_bandwidth`, `tx_ops`; nothing lifts one.

        Raises:
            ConfigError: a value is no limit.
            HostError: the frames are not moved here.
        """
        if self._config.vhost:
            hint = "use tc on the tap, or no vhost"
            raise HostError("limit", "the kernel moves the frames of this interface", hint)
        parsed = {name: parse_bucket(text, name) for name, text in buckets.items()}
        with self._slot.device.lock:
            self.net.limit(parsed)


def build(config: Interface, wiring: Wiring) -> Controls:
    """A network interface on the link that the configuration names.

    A thread of C, or the host's kernel, moves the frames of each pair of queues.
    """
    from vmm_reference.devices.offload import Offload

    from .served import ServedNet

    link = _link_of(config)
    wiring.on_close(link.close)
    servers: list[VhostNet | LinkPump] = []
    pumps: list[LinkPump] = []
    kernels: list[VhostNet] = []
    for fd in link.fds:
        if config.vhost:
            from vmm_reference.backends.vhost import VhostNet

            kernels.append(VhostNet(wiring.memory, fd))
            servers.append(kernels[-1])
        else:
            from vmm_reference.backends.pumps import LinkPump

            pumps.append(LinkPump(wiring.memory, fd, link.kind, link.peer))
            servers.append(pumps[-1])
        wiring.on_close(servers[-1].close)
    pairs = [(server, (2 * pair, 2 * pair + 1)) for pair, server in enumerate(servers)]
    offload = Offload("vhost-net" if config.vhost else "the pump", pairs)
    net = ServedNet(
        link, bytes.fromhex(config.mac.replace(":", "")) or _random_mac(), offload, pumps,
        keeps_mac=bool(config.mac), mtu=config.mtu, pairs=config.queues,
        kick=lambda queue: slot.kick(queue),
    )  # fmt: skip
    net.limit({name: parse_bucket(getattr(config, name), name) for name in _LIMITS})
    slot: VirtioSlot = wiring.virtio(net)
    offload.plug_in(slot, wiring)
    for kernel in kernels:
        kernel.follow(slot.device, wiring)
    return Controls(config, net, slot)


def _link_of(config: Interface) -> Tap | DatagramLink | Passt:
    if config.tap:
        from vmm_reference.backends.tap import Tap

        return Tap(config.tap, config.queues)
    if config.socket:
        from vmm_reference.backends.datagram import DatagramLink

        return DatagramLink(config.socket, config.peer)
    from vmm_reference.backends.passt import Passt

    return Passt([argument for port in config.ports.split() for argument in ("-t", port)])
