"""The firmware configuration device: what is read by ports and by DMA, whatever a guest asks."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vm_memory import GuestAddress, GuestMemory
from vmm_reference.devices.fw_cfg import DATA, DMA, FILES, MAX_DMA, SELECTOR, FwCfg
from vmm_reference.devices.states import FwCfgState, StateError

SIZE = 1 << 20
READ, SKIP, SELECT, WRITE = 2, 4, 8, 16
FILES_HERE = {"etc/e820": bytes(range(200)), "bootorder": b"", "opt/long": b"x" * 5000}


@pytest.fixture(scope="module")
def memory() -> GuestMemory:
    return GuestMemory.from_ranges([(GuestAddress(0), SIZE)])


def device(memory: GuestMemory) -> FwCfg:
    return FwCfg(memory, {0x05: b"\x04\x00"}, FILES_HERE)


def select(config: FwCfg, key: int) -> None:
    config.write(SELECTOR, key.to_bytes(2, "little"))


def directory(config: FwCfg) -> dict[str, tuple[int, int]]:
    """Name to key and size, as firmware reads it."""
    select(config, 0x19)
    (count,) = struct.unpack(">I", b"".join(config.read(DATA, 1) for _ in range(4)))
    found = {}
    for _ in range(count):
        size, key, name = struct.unpack(">IHxx56s", config.read(DATA, 64))
        found[name.rstrip(b"\0").decode()] = (key, size)
    return found


def dma(memory: GuestMemory, config: FwCfg, control: int, length: int, address: int) -> int:
    """One access by a structure at 0x100; returns its control word afterwards."""
    memory.write(GuestAddress(0x100), struct.pack(">IIQ", control, length, address))
    config.write(DMA, bytes(4))
    config.write(DMA + 4, (0x100).to_bytes(4, "big"))
    return int.from_bytes(memory.read(GuestAddress(0x100), 4), "big")


def test_firmware_finds_the_device_and_its_files(memory: GuestMemory) -> None:
    """The signature, the features, the sign of DMA, and every file by its key."""
    config = device(memory)
    select(config, 0)
    assert config.read(DATA, 4) == b"QEMU"
    select(config, 1)
    assert config.read(DATA, 4) == b"\x03\0\0\0"
    assert config.read(DMA, 4) + config.read(DMA + 4, 4) == b"QEMU CFG"
    select(config, 5)
    assert config.read(DATA, 4) == b"\x04\0\0\0"
    files = directory(config)
    assert list(files) == sorted(FILES_HERE)
    for name, content in FILES_HERE.items():
        key, size = files[name]
        assert size == len(content)
        select(config, key)
        assert config.read(DATA, size + 3) == content + b"\0\0\0"
        assert dma(memory, config, key << 16 | SELECT | READ, size, 0x1000) == 0
        assert memory.read(GuestAddress(0x1000), size) == content


def test_dma_goes_on_where_the_last_access_ended(memory: GuestMemory) -> None:
    """Skipping and reading, by DMA and by the port, share one position."""
    config = device(memory)
    key, _ = directory(config)["etc/e820"]
    assert dma(memory, config, key << 16 | SELECT | SKIP, 10, 0) == 0
    assert dma(memory, config, READ, 4, 0x2000) == 0
    assert memory.read(GuestAddress(0x2000), 4) == bytes(range(10, 14))
    assert config.read(DATA, 2) == bytes((14, 15))
    again = device(memory)
    again.restore(config.save())
    assert again.read(DATA, 2) == config.read(DATA, 2) == bytes((16, 17))


@pytest.mark.parametrize(
    ("control", "length", "address"),
    [(WRITE, 4, 0x1000), (READ, MAX_DMA + 1, 0), (READ, 2, SIZE - 1), (READ, 8, (1 << 64) - 4)],
)
def test_what_cannot_be_done_is_an_error_and_changes_nothing(
    memory: GuestMemory, control: int, length: int, address: int
) -> None:
    """Writing, too long an access, and a target outside memory set the error bit."""
    config = device(memory)
    memory.fill(GuestAddress(0x1000), SIZE - 0x1000, 0xAA)
    assert dma(memory, config, control, length, address) == 1
    assert config.errors == 1
    left = memory.read(GuestAddress(0x1000), SIZE - 0x1000)
    assert left == b"\xaa" * len(left)


ports = st.one_of(
    st.tuples(st.just("read"), st.integers(0, 11), st.integers(1, 8)),
    st.tuples(st.just("write"), st.integers(0, 11), st.binary(min_size=1, max_size=8)),
    st.tuples(
        st.just("dma"),
        st.integers(0, 1 << 32),
        st.tuples(st.integers(0, (1 << 32) - 1), st.integers(0, 1 << 17)),
    ),
)


@given(st.lists(ports, max_size=25))
def test_a_hostile_guest_gets_answers_of_the_right_length(
    memory: GuestMemory, steps: list[tuple[str, int, object]]
) -> None:
    """No access raises; state is valid after each of them."""
    config = device(memory)
    for kind, number, value in steps:
        if kind == "read":
            assert isinstance(value, int)
            assert len(config.read(number, value)) == value
        elif kind == "write":
            assert isinstance(value, bytes)
            config.write(number, value)
        else:
            assert isinstance(value, tuple)
            dma(memory, config, value[0], value[1], number)
        config.restore(config.save())


def test_impossible_files_and_states_are_refused(memory: GuestMemory) -> None:
    """A name that does not fit, too many files, a key of more than 16 bits."""
    for name in ("", "x" * 56, "\xe9"):
        with pytest.raises(ValueError, match="55 ASCII"):
            FwCfg(memory, {}, {name: b""})
    with pytest.raises(ValueError, match="at most"):
        FwCfg(memory, {}, {str(number): b"" for number in range(FILES + 1)})
    with pytest.raises(StateError, match="key"):
        FwCfgState(1 << 16, 0, 0)
