"""Snapshots as folders: whole or refused, and the one that was there stays until the next is."""

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvm_ioctls.state import Regs, Xcrs
from vmm_reference.devices.states import PowerState
from vmm_reference.errors import HostError
from vmm_reference.state import folder as folder_module
from vmm_reference.state.folder import Difference, SnapshotReader, SnapshotWriter
from vmm_reference.state.format import FormatError

PARTS = {"vcpu0": Regs(rip=0x1000, rax=1 << 63), "xcr": Xcrs(), "power": PowerState(3, True)}


def write(folder: Path, *, number: int = 0, base: Difference | None = None) -> str:
    with SnapshotWriter(folder) as writer:
        os.pwrite(writer.memory, b"guest" * 1000, 4096 * 7)
        for name, state in PARTS.items():
            writer.add(name, state)
        writer.add("number", Regs(rax=number))
        return writer.commit("0.1.0", base)


def read(folder: Path) -> tuple[int, bytes]:
    """Everything in it, checked; the number that tells snapshots apart, and the memory."""
    with SnapshotReader(folder) as reader:
        assert reader.names() == [*PARTS, "number"]
        for name, state in PARTS.items():
            assert reader.state(name, type(state)) == state
        memory = os.pread(reader.memory, 1 << 20, 0)
        return reader.state("number", Regs).rax, memory


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """States by name, memory as it was; the digest is the snapshot's identity."""
    digest = write(tmp_path / "a", number=7)
    number, memory = read(tmp_path / "a")
    assert number == 7
    assert memory == bytes(4096 * 7) + b"guest" * 1000
    with SnapshotReader(tmp_path / "a") as reader:
        assert reader.digest == digest
        assert reader.base() is None
        with pytest.raises(FormatError, match="no part of this"):
            reader.state("vcpu1", Regs)
        with pytest.raises(FormatError, match=r"vcpu0\."):
            reader.state("vcpu0", Xcrs)
    assert all(path.stat().st_mode & 0o077 == 0 for path in files(tmp_path / "a"))


def test_the_next_replaces_it_and_leaves_no_rest(tmp_path: Path) -> None:
    """As many files as before; who has the old one open can read its memory still."""
    write(tmp_path, number=1)
    before = len(files(tmp_path))
    with SnapshotReader(tmp_path) as old:
        write(tmp_path, number=2)
        assert os.pread(old.memory, 5, 4096 * 7) == b"guest"
    assert read(tmp_path)[0] == 2
    assert len(files(tmp_path)) == before


def test_every_byte_of_manifest_and_states_counts(tmp_path: Path) -> None:
    """Each flipped once, in one bit: the snapshot is refused, whichever it is."""
    write(tmp_path)
    paths = [path for path in files(tmp_path) if path.name != "memory"]
    assert len(paths) == 2 + len(PARTS)
    flipped = 0
    for path in paths:
        sound = path.read_bytes()
        for place in range(len(sound)):
            data = bytearray(sound)
            data[place] ^= 1 << place % 8
            path.write_bytes(data)
            with pytest.raises((FormatError, HostError)):
                read(tmp_path)
            flipped += 1
        path.write_bytes(sound)
    assert flipped > 1000
    read(tmp_path)


@settings(max_examples=60)
@given(data=st.data())
def test_a_file_of_another_length_is_refused(data: st.DataObject) -> None:
    """Cut or grown, the memory's file included; or gone."""
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder)
        path = data.draw(st.sampled_from(files(folder)))
        size = path.stat().st_size
        new = data.draw(st.none() | st.integers(0, 2 * size).filter(lambda n: n != size))
        if new is None:
            path.unlink()
        else:
            os.truncate(path, new)
        with pytest.raises((FormatError, HostError)):
            read(folder)


@pytest.mark.parametrize("target", ["state", "manifest"])
def test_a_generation_never_leaves_the_folder(tmp_path: Path, target: str) -> None:
    """A manifest from elsewhere can't name a file outside: names are letters and digits."""
    bad = {"state": {"name": "../x"}, "manifest": {"generation": "../../etc/passwd"}}[target]
    make = folder_module.Part if target == "state" else folder_module.Manifest
    good = (
        {"name": "x", "size": 1, "sha256": "0" * 64}
        if target == "state"
        else {"writer": "", "generation": "0" * 16, "parts": (), "memory_size": 0}
    )
    make(**good)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be"):
        make(**{**good, **bad})  # type: ignore[arg-type]


class Crash(BaseException):
    """The process ends here: nothing behind this runs, clean-up neither."""


def failing(
    monkeypatch: pytest.MonkeyPatch, at: int, error: Callable[[], BaseException]
) -> list[int]:
    """Let the call number `at` of those that change the disk fail; tells how many were left."""
    left = [at]

    def wrap(name: str) -> None:
        real = getattr(os, name)

        def call(*arguments: object, **named: object) -> object:
            left[0] -= 1
            if left[0] == -1:
                raise error()
            if left[0] < -1 and isinstance(error(), Crash):
                raise error()
            return real(*arguments, **named)

        monkeypatch.setattr(os, name, call)

    for name in ("fsync", "open", "write", "mkdir", "replace", "pwrite"):
        wrap(name)
    return left


@pytest.mark.parametrize("kind", ["crash", "full disk"])
@pytest.mark.parametrize("existing", [True, False])
def test_whatever_breaks_there_is_the_old_one_or_the_new_one(
    tmp_path: Path, kind: str, existing: bool
) -> None:
    """Every step of writing fails once: what is read then is whole, and never a mixture."""

    def error() -> BaseException:
        return Crash() if kind == "crash" else OSError(28, "No space left on device")

    outcomes = []
    for at in range(1000):
        target = tmp_path / str(at)
        if existing:
            write(target, number=1)
        with pytest.MonkeyPatch.context() as patch:
            left = failing(patch, at, error)
            with contextlib.suppress(Crash, OSError):
                write(target, number=2)
        if left[0] >= 0:  # there is no such step: it went well
            break
        try:
            number, memory = read(target)
        except HostError:
            number = 0
            assert not existing
        else:
            assert memory == bytes(4096 * 7) + b"guest" * 1000
        outcomes.append(number)
        write(target, number=3)  # the next one clears up
        assert read(target)[0] == 3
        assert len(files(target)) == 3 + len(PARTS)
    assert len(outcomes) > 15
    # First the old one, from the commit on the new one.
    assert outcomes == sorted(outcomes)
    assert outcomes[0] == (1 if existing else 0)
    assert read(target)[0] == 2
    shutil.rmtree(tmp_path)


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    """A second one is refused and disturbs nothing."""
    with SnapshotWriter(tmp_path) as first:
        with pytest.raises(HostError, match="another one is being written"):
            SnapshotWriter(tmp_path)
        first.add("number", Regs())
        first.commit("0.1.0")
    with SnapshotReader(tmp_path) as reader:
        assert reader.names() == ["number"]


def test_what_is_not_committed_leaves_no_file(tmp_path: Path) -> None:
    """Neither by an error nor without one."""
    with pytest.raises(RuntimeError), SnapshotWriter(tmp_path):
        raise RuntimeError
    with SnapshotWriter(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(HostError):
        SnapshotReader(tmp_path)


def test_a_base_is_the_very_one(tmp_path: Path) -> None:
    """Another snapshot in its place is refused."""
    digest = write(tmp_path / "base")
    write(tmp_path / "next", number=1, base=Difference("../base", digest))
    with SnapshotReader(tmp_path / "next") as reader:
        base = reader.base()
        assert base is not None
        assert base.digest == digest
        base.close()
        write(tmp_path / "base", number=5)
        with pytest.raises(FormatError, match="another snapshot"):
            reader.base()
        shutil.rmtree(tmp_path / "base")
        with pytest.raises(HostError):
            reader.base()
