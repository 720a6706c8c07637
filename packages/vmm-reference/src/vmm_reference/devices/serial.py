"""The serial port: a National Semiconductor PC16550D, as a PC has it at 0x3F8.

The line is endlessly fast: a byte leaves as soon as it is written, and what the host types is
there at once. What follows:

- LSR shows an empty transmitter, so that a driver which polls never waits, until the host is
  behind: when less than a FIFO fits into `limit` bytes under way, THRE and TEMT go away, and with
  them their interrupt, until `transmitted` says that some have gone. The guest's vCPU never waits.
  A byte that is written all the same is dropped and counted in `dropped`.
- A driver that sends by interrupt finds the transmitter empty again when it next reads IIR, but no
  more than `BURST` bytes ahead of the host: then, and for a driver that does not look, the
  interrupt comes when the host has taken some. So a driver that has much to send does not stay in
  its interrupt handler for all of it.
- Received bytes below the FIFO's trigger level have always rested for four character times, so
  they raise the character timeout interrupt.
- Divisor, parity and word length are stored, and change nothing.

Most of what a guest does here are two accesses a character: it reads LSR and writes the byte; one
that sends by interrupt writes as many bytes as the FIFO has, and reads LSR and MSR before; when it
is through it masks the interrupt, and reads in IIR that there is none. As long as nothing but an
empty transmitter is to be told, whoever serves the guest may answer these reads with `IDLE`,
`CONNECTED` and what IIR then is, and keep the bytes for a while (`posted`); `quiet` tells what of
that begins and ends. An interrupt that the next byte takes back is to be told.

The interrupt output is a function of the registers alone, computed after every change: masking and
unmasking in IER drops and raises the line, so a pending cause is never lost to a driver that masks
interrupts for a while.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .states import SerialState

__all__ = ["Serial"]

FIFO_SIZE = 16

# Offsets; several registers share one, told apart by direction and by LCR's divisor latch bit.
DATA, IER, IIR_FCR, LCR, MCR, LSR, MSR, SCR = range(8)

IER_RX, IER_THRE, IER_LINE, IER_MODEM = 0x01, 0x02, 0x04, 0x08
IIR_MODEM, IIR_NONE, IIR_THRE, IIR_RX, IIR_LINE, IIR_TIMEOUT = 0x00, 0x01, 0x02, 0x04, 0x06, 0x0C
IIR_FIFO = 0xC0
FCR_ENABLE, FCR_CLEAR_RX = 0x01, 0x02
FCR_KEPT = 0xC9  # enable, DMA mode, trigger level; the clear bits clear themselves
LCR_BREAK, LCR_DLAB = 0x40, 0x80
MCR_LOOP = 0x10
LSR_DATA, LSR_OVERRUN, LSR_FRAMING, LSR_BREAK = 0x01, 0x02, 0x08, 0x10
LSR_THRE, LSR_TEMT, LSR_FIFO_ERROR = 0x20, 0x40, 0x80
IDLE = LSR_THRE | LSR_TEMT
MSR_CTS, MSR_DSR, MSR_RI, MSR_DCD = 0x10, 0x20, 0x40, 0x80
CONNECTED = MSR_DCD | MSR_DSR | MSR_CTS

TRIGGER_LEVELS = (1, 4, 8, 14)

BURST = 256


class Serial:
    r"""A 16550A UART whose line ends in two callables.

    Args:
        interrupt: is given the level of the interrupt output, each time that it changes.
        transmit: is given the bytes that the guest sends. It must not block; each of these bytes
            is to be taken back by `transmitted`, at the earliest from within the call.
        room: is called when received bytes fit again after `receive` had to refuse some.
        limit: how many bytes may be under way before the guest is told to wait, at least 32.
        quiet: is told, when one of them changes: whether LSR reads as `IDLE` and MSR as
            `CONNECTED`, and will after `ahead` more bytes; whether moreover a byte that is written
            does nothing but leave; what IIR reads as all this time, or None where to read it
            changes something. At first it is True, True and `IIR_NONE`.
        ahead: how many bytes may be kept before `posted` is told of them.

    Attributes:
        dropped: bytes the guest wrote although it was told to wait.
        breaks: how many times the guest sent a break.

    Example:
        >>> sent = []
        >>> uart = Serial(interrupt=lambda level: None, transmit=sent.append)
        >>> uart.write(0, b"H")
        >>> sent
        [b'H']
        >>> uart.write(2, b"\x01")  # the FIFOs on
        >>> uart.receive(b"typed")
        5
        >>> uart.read(0, 1)
        b't'
    """

    def __init__(
        self,
        interrupt: Callable[[bool], None],
        transmit: Callable[[bytes], None],
        *,
        room: Callable[[], None] | None = None,
        limit: int = 4096,
        quiet: Callable[[bool, bool, int | None], None] | None = None,
        ahead: int = 0,
    ) -> None:
        if limit < 2 * FIFO_SIZE + ahead:
            raise ValueError(f"limit: {limit}: must be at least {2 * FIFO_SIZE + ahead} bytes")
        self.dropped = 0
        self.breaks = 0
        self._interrupt = interrupt
        self._transmit = transmit
        self._room = room
        self._limit = limit
        # THRE promises the guest room for a whole FIFO.
        self._ready_below = limit - FIFO_SIZE
        self._tell_quiet, self._ahead = quiet, ahead
        self._quiet = self._plain = True
        self._quiet_iir: int | None = IIR_NONE
        self._line = False
        self._under_way = 0
        self._refused = False
        self._ier = self._fcr = self._lcr = self._mcr = self._scr = 0
        self._dll, self._dlm = 12, 0  # 9600 baud
        self._msr_delta = 0
        self._received = bytearray()
        self._errors = bytearray()  # the line status bits that came with each received byte
        self._line_errors = 0  # what LSR shows until it is read
        self._thre_pending = False
        self._thre_owed = False  # bytes left, which the guest has not been told

    # What the guest does.

    def read(self, offset: int, length: int) -> bytes:
        """What the guest reads; an access of more than a byte takes registers in turn."""
        if length == 1:
            value = self._read(offset).to_bytes()
        else:
            value = bytes([self._read(offset + n) for n in range(length)])
        if not self._plain:
            self._look()
        return value

    def write(self, offset: int, data: bytes) -> None:
        """What the guest writes; an access of more than a byte fills registers in turn."""
        if offset == DATA and len(data) == 1 and not self._lcr & LCR_DLAB:
            self._write_thr(data[0])
        else:
            for value in data:
                self._write(offset, value)
                offset += 1
        self._look()

    def posted(self, data: bytes) -> None:
        """Bytes that were written to the transmitter, and kept while it was quiet."""
        if self._plain and self._under_way + len(data) <= self._limit:
            self._thre_pending, self._thre_owed = False, True
            self._under_way += len(data)
            self._transmit(data)
        else:  # what another vCPU has done since may matter
            for value in data:
                self._write_thr(value)
        self._look()

    # What the host does.

    @property
    def receive_space(self) -> int:
        """How many bytes `receive` would take now."""
        if self._mcr & MCR_LOOP:
            return 0  # the input is cut off
        return (FIFO_SIZE if self._fcr & FCR_ENABLE else 1) - len(self._received)

    def receive(self, data: bytes) -> int:
        """Bytes arrive on the line; says how many were taken, from the first.

        After it took fewer than it was given, `room` is called once there is space.
        """
        taken = data[: max(self.receive_space, 0)]
        self._received += taken
        self._errors += bytes(len(taken))
        if len(taken) < len(data):
            self._refused = True
        self._update()
        self._look()
        return len(taken)

    def receive_break(self) -> bool:
        """A break arrives on the line: a null byte with the break bit. False: no space for it."""
        if self.receive_space < 1:
            self._refused = True
            return False
        self._arrive(0, LSR_BREAK | LSR_FRAMING)
        self._update()
        self._look()
        return True

    def transmitted(self, count: int) -> None:
        """`count` of the bytes given to `transmit` are gone; the guest may send more.

        Raises:
            ValueError: that many are not under way.
        """
        if not 0 <= count <= self._under_way:
            raise ValueError(f"count: {count}: only {self._under_way} bytes are under way")
        self._under_way -= count
        if count and self._under_way <= self._ready_below:
            self._thre_pending, self._thre_owed = True, False
            if self._ier & IER_THRE:
                self._update()
        self._look()

    @property
    def interrupt_level(self) -> bool:
        """The level of the interrupt output."""
        return self._line

    # State.

    def save(self) -> SerialState:
        """All that a guest could tell this UART by. Bytes under way are the backend's."""
        from .states import SerialState

        return SerialState(
            ier=self._ier,
            fcr=self._fcr,
            lcr=self._lcr,
            mcr=self._mcr,
            msr_delta=self._msr_delta,
            scr=self._scr,
            dll=self._dll,
            dlm=self._dlm,
            received=bytes(self._received),
            received_errors=bytes(self._errors),
            line_errors=self._line_errors,
            thr_empty_pending=self._thre_pending,
            transmitting=self._under_way > 0,
        )

    def restore(self, state: SerialState) -> None:
        """Become the UART that `state` was saved from, with nothing under way.

        What was under way is gone, and the transmitter says so by its interrupt.
        """
        self._ier, self._fcr, self._lcr, self._mcr = state.ier, state.fcr, state.lcr, state.mcr
        self._msr_delta, self._scr = state.msr_delta, state.scr
        self._dll, self._dlm = state.dll, state.dlm
        self._received = bytearray(state.received)
        self._errors = bytearray(state.received_errors)
        self._line_errors = state.line_errors
        self._thre_pending = state.thr_empty_pending or state.transmitting
        self._thre_owed = False
        self._under_way = 0
        self._refused = True  # whoever waited for room is told again
        self._update()
        self._tell_room()
        self._look()

    # The registers.

    def _read(self, offset: int) -> int:
        if offset == LSR:
            return self._read_lsr()
        if offset == DATA:
            return self._dll if self._lcr & LCR_DLAB else self._read_rbr()
        if offset == IIR_FCR:
            return self._read_iir()
        if offset == IER:
            return self._dlm if self._lcr & LCR_DLAB else self._ier
        if offset == LCR:
            return self._lcr
        if offset == MCR:
            return self._mcr
        if offset == MSR:
            value = self._modem_lines() | self._msr_delta
            self._msr_delta = 0
            self._update()
            return value
        return self._scr if offset == SCR else 0xFF

    def _write(self, offset: int, value: int) -> None:
        if offset == DATA:
            if self._lcr & LCR_DLAB:
                self._dll = value
            else:
                self._write_thr(value)
        elif offset == IER:
            if self._lcr & LCR_DLAB:
                self._dlm = value
            else:
                # Enabling the interrupt of an empty transmitter raises it; drivers start by that.
                if value & ~self._ier & IER_THRE:
                    self._thre_owed = False
                    self._thre_pending = self._under_way <= self._ready_below
                self._ier = value & 0x0F
                self._update()
        elif offset == IIR_FCR:
            self._write_fcr(value)
        elif offset == LCR:
            if value & ~self._lcr & LCR_BREAK:
                self._send_break()
            self._lcr = value
        elif offset == MCR:
            before = self._modem_lines()
            self._mcr = value & 0x1F
            after = self._modem_lines()
            # The ring indicator counts only where it ends; the others count both ways.
            changed = (before ^ after) & ~(after & MSR_RI)
            self._msr_delta |= changed >> 4
            self._update()
            self._tell_room()
        elif offset == SCR:
            self._scr = value

    def _write_thr(self, value: int) -> None:
        # The byte takes the place of the interrupt.
        if self._thre_pending:
            self._thre_pending = False
            if self._ier & IER_THRE:
                self._update()
        if self._mcr & MCR_LOOP:
            self._loop_back(value, 0)
            self._thre_pending = self._under_way <= self._ready_below
            self._update()
        elif self._under_way < self._limit:
            self._under_way += 1
            self._thre_owed = True
            self._transmit(value.to_bytes())
        else:
            self.dropped += 1

    def _write_fcr(self, value: int) -> None:
        if (value ^ self._fcr) & FCR_ENABLE or value & FCR_CLEAR_RX:
            self._received.clear()
            self._errors.clear()
            self._line_errors &= LSR_OVERRUN
        # Without the FIFO the other bits are not programmed.
        self._fcr = value & FCR_KEPT if value & FCR_ENABLE else 0
        self._update()
        self._tell_room()

    def _read_rbr(self) -> int:
        if not self._received:
            return 0
        value = self._received.pop(0)
        self._errors.pop(0)
        self._show_errors()
        self._update()
        self._tell_room()
        return value

    def _read_lsr(self) -> int:
        value = IDLE if self._under_way <= self._ready_below else 0
        if self._received:
            value |= LSR_DATA
        if self._fcr & FCR_ENABLE and (self._line_errors & ~LSR_OVERRUN or any(self._errors)):
            value |= LSR_FIFO_ERROR
        if self._line_errors:
            value |= self._line_errors
            self._line_errors = 0
            self._update()
        return value

    def _read_iir(self) -> int:
        if self._thre_owed and self._under_way <= BURST and self._ier & IER_THRE:
            self._thre_pending, self._thre_owed = True, False
        cause = self._cause()
        if cause == IIR_THRE:
            self._thre_pending = False
        self._update()
        return cause | IIR_FIFO if self._fcr & FCR_ENABLE else cause

    # What follows from the registers.

    def _modem_lines(self) -> int:
        """The upper half of MSR: a cable that is always ready, or in loopback MCR's outputs."""
        if not self._mcr & MCR_LOOP:
            return CONNECTED
        dtr, rts, rest = self._mcr & 1, self._mcr >> 1 & 1, self._mcr >> 2 & 3
        return dtr << 5 | rts << 4 | rest << 6

    def _cause(self) -> int:
        """The pending interrupt of the highest priority, as IIR names it."""
        ier = self._ier
        if ier & IER_LINE and self._line_errors:
            return IIR_LINE
        if ier & IER_RX and self._received:
            if not self._fcr & FCR_ENABLE:
                return IIR_RX
            full = len(self._received) >= TRIGGER_LEVELS[self._fcr >> 6]
            return IIR_RX if full else IIR_TIMEOUT
        if ier & IER_THRE and self._thre_pending:
            return IIR_THRE
        if ier & IER_MODEM and self._msr_delta:
            return IIR_MODEM
        return IIR_NONE

    def _update(self) -> None:
        """Drive the interrupt output; a transmitter that is full withholds its interrupt."""
        if self._under_way > self._ready_below:
            self._thre_pending = False
        level = self._cause() != IIR_NONE
        if level != self._line:
            self._line = level
            if level:  # a handler may run before this is over: it must not be told of no interrupt
                self._look()
            self._interrupt(level)

    def _look(self) -> None:
        """Say what the guest may be answered without this UART, if that has changed."""
        quiet = (
            self._under_way + self._ahead <= self._ready_below
            and not self._received
            and not self._line_errors
            and not self._msr_delta
            and not self._mcr & MCR_LOOP
        )
        masked = not self._ier & IER_THRE
        plain = quiet and not self._lcr & LCR_DLAB and (masked or not self._thre_pending)
        iir = None
        if quiet and masked:
            iir = IIR_NONE | IIR_FIFO if self._fcr & FCR_ENABLE else IIR_NONE
        if quiet != self._quiet or plain != self._plain or iir != self._quiet_iir:
            self._quiet, self._plain, self._quiet_iir = quiet, plain, iir
            if self._tell_quiet is not None:
                self._tell_quiet(quiet, plain, iir)

    def _tell_room(self) -> None:
        if self._refused and self._room is not None and self.receive_space > 0:
            self._refused = False
            self._room()

    def _send_break(self) -> None:
        if self._mcr & MCR_LOOP:
            self._loop_back(0, LSR_BREAK | LSR_FRAMING)
            self._update()
        else:
            self.breaks += 1

    def _loop_back(self, value: int, errors: int) -> None:
        """The transmitter's output is the receiver's input; nobody looks whether it is full."""
        fifo = self._fcr & FCR_ENABLE
        if len(self._received) >= (FIFO_SIZE if fifo else 1):
            self._line_errors |= LSR_OVERRUN
            if fifo:
                return  # the byte stays in the shift register, and the next one takes its place
            self._received.clear()
            self._errors.clear()
        self._arrive(value, errors)

    def _arrive(self, value: int, errors: int) -> None:
        self._received.append(value)
        self._errors.append(errors)
        if len(self._errors) == 1:
            self._show_errors()

    def _show_errors(self) -> None:
        """Errors show in LSR when their byte is the next to be read, and stay until LSR is read."""
        if self._errors:
            self._line_errors |= self._errors[0]
            self._errors[0] = 0
