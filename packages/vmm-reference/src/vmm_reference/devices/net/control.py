"""What a driver asks of a network device by its control queue: virtio 1.3, section 5.1.6.5.

Commands are parsed from a copy and checked against what was negotiated; a command that breaks a
rule changes nothing. Filters are kept here too, and say which frames a driver wants.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from virtio_queue import Reader
    from vmm_reference.devices.states import NetState

__all__ = ["ERR", "MAX_TABLE", "OK", "Control"]

OK, ERR = b"\0", b"\1"

# Classes and their commands.
RX, MAC, VLAN, ANNOUNCE, MQ, GUEST_OFFLOADS = range(6)
_RX_MODES = PROMISC, ALLMULTI, ALLUNI, NOMULTI, NOUNI, NOBCAST = tuple(1 << n for n in range(6))
# The driver gave more addresses than are kept: all of that kind pass, as 5.1.6.5.2 allows.
OVER_UNI, OVER_MULTI = 1 << 6, 1 << 7
_MAC_TABLE_SET, _MAC_ADDR_SET = 0, 1
_VLAN_ADD, _VLAN_DEL = 0, 1

_F_CTRL_GUEST_OFFLOADS, _F_CTRL_RX, _F_CTRL_VLAN = 1 << 2, 1 << 18, 1 << 19
_F_CTRL_RX_EXTRA, _F_GUEST_ANNOUNCE, _F_MQ, _F_CTRL_MAC_ADDR = 1 << 20, 1 << 21, 1 << 22, 1 << 23

_BROADCAST = b"\xff" * 6
_VLAN_TAG = b"\x81\x00"
_COMMAND, _U16, _U32, _U64 = Struct("<BB"), Struct("<H"), Struct("<I"), Struct("<Q")

MAX_TABLE = 64  # addresses of each kind


class Control:
    """A driver's wishes: address, filters, offloads.

    Args:
        mac: the address after a reset.
        keeps_permanent: whether that stays so when a state is restored.

    Attributes:
        permanent: the address after a reset.
        mac: the address now.
        mode: receive modes as bits, `PROMISC` to `NOBCAST`, and the tables' overflows.
        unicast: addresses of single stations that pass.
        multicast: addresses of groups that pass.
        vlans: VLANs that pass.
        offloads: the `GUEST_` offloads a driver chose, or None for all that it negotiated.
    """

    def __init__(self, mac: bytes, *, keeps_permanent: bool = False) -> None:
        self.permanent = mac
        self._keeps_permanent = keeps_permanent
        self.reset()

    def reset(self) -> None:
        """Forget the driver."""
        self.mac = self.permanent
        self.mode = 0
        self.unicast: list[bytes] = []
        self.multicast: list[bytes] = []
        self.vlans: set[int] = set()
        self.offloads: int | None = None

    def restore(self, state: NetState) -> None:
        """Take up what was saved."""
        if not self._keeps_permanent:
            self.permanent = state.permanent_mac
        self.mac, self.mode = state.mac, state.mode
        self.unicast, self.multicast = list(state.unicast), list(state.multicast)
        self.vlans, self.offloads = set(state.vlans), state.offloads

    @property
    def modes(self) -> int:
        """Receive modes with tables that are too long for all of their kind."""
        over = (self.mode & OVER_UNI and ALLUNI) | (self.mode & OVER_MULTI and ALLMULTI)
        return self.mode & ~(OVER_UNI | OVER_MULTI) | over

    def offloads_of(self, negotiated: int) -> int:
        """What the link is to do for the guest."""
        return negotiated if self.offloads is None else self.offloads & negotiated

    def wants(self, start: bytes | bytearray | memoryview) -> bool:
        """Whether a frame passes, by its first 18 bytes or as many as it has."""
        start = bytes(start)
        modes = self.modes
        if modes & PROMISC:
            return True
        tagged = start[12:14] == _VLAN_TAG and len(start) >= 16
        if tagged and int.from_bytes(start[14:16], "big") & 0xFFF not in self.vlans:
            return False
        target = start[:6]
        if target == _BROADCAST:
            return not modes & NOBCAST
        if target[0] & 1:
            passes = modes & ALLMULTI or target in self.multicast
            return bool(passes) and not modes & NOMULTI
        passes = modes & ALLUNI or target == self.mac or target in self.unicast
        return bool(passes) and not modes & NOUNI

    def parse(self, reader: Reader, features: int) -> tuple[str, int] | None:
        """Take one command, and carry it out where it concerns nothing but filters.

        Returns:
            What is left to do (`pairs`, `offloads`, `announced`, or `done` for nothing) with its
            value; or None if it was refused.
        """
        if reader.available < _COMMAND.size:
            return None
        kind, command = reader.read_struct(_COMMAND)
        if kind == RX:
            return self._set_mode(reader, command, features)
        if kind == MAC:
            return self._set_addresses(reader, command, features)
        if kind == VLAN and features & _F_CTRL_VLAN:
            vlan = self._number(reader, _U16)
            if vlan is None or vlan >= 4096 or command not in (_VLAN_ADD, _VLAN_DEL):
                return None
            (self.vlans.add if command == _VLAN_ADD else self.vlans.discard)(vlan)
            return "done", 0
        if command != 0:
            return None
        if kind == ANNOUNCE and features & _F_GUEST_ANNOUNCE:
            return ("announced", 0) if not reader.available else None
        if kind == MQ and features & _F_MQ:
            pairs = self._number(reader, _U16)
            return None if pairs is None else ("pairs", pairs)
        if kind == GUEST_OFFLOADS and features & _F_CTRL_GUEST_OFFLOADS:
            offloads = self._number(reader, _U64)
            return None if offloads is None else ("offloads", offloads)
        return None

    @staticmethod
    def _number(reader: Reader, layout: Struct) -> int | None:
        """The number that is all of a command's data."""
        if reader.available != layout.size:
            return None
        (value,) = reader.read_struct(layout)
        return int(value)

    def _set_mode(self, reader: Reader, command: int, features: int) -> tuple[str, int] | None:
        needed = _F_CTRL_RX if command < 2 else _F_CTRL_RX_EXTRA
        if command >= len(_RX_MODES) or not features & needed or reader.available != 1:
            return None
        bit = _RX_MODES[command]
        self.mode = self.mode | bit if reader.read(1) != b"\0" else self.mode & ~bit
        return "done", 0

    def _set_addresses(self, reader: Reader, command: int, features: int) -> tuple[str, int] | None:
        if command == _MAC_ADDR_SET and features & _F_CTRL_MAC_ADDR and reader.available == 6:
            self.mac = reader.read(6)
            return "done", 0
        if command != _MAC_TABLE_SET or not features & _F_CTRL_RX:
            return None
        tables: list[list[bytes]] = []
        over = 0
        for bit in (OVER_UNI, OVER_MULTI):
            if reader.available < _U32.size:
                return None
            (count,) = reader.read_struct(_U32)
            if count * 6 > reader.available:
                return None
            if count > MAX_TABLE:
                over |= bit
                reader.advance(count * 6)
                count = 0
            tables.append([reader.read(6) for _ in range(count)])
        if reader.available:
            return None
        self.unicast, self.multicast = tables
        self.mode = self.mode & ~(OVER_UNI | OVER_MULTI) | over
        return "done", 0
