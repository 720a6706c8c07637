"""Machines that are saved and come back: the guest can't tell, and neither can who compares."""

import gc
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest

from kvm_ioctls.state import VcpuState
from vm_memory import GuestMemory, Options
from vm_memory.looking import compare
from vmm_reference.config import Drive, MachineConfig
from vmm_reference.errors import HostError
from vmm_reference.machine import Machine
from vmm_reference.outcome import Outcome
from vmm_reference.state import memory as pages
from vmm_reference.state import snapshot
from vmm_reference.state.folder import SnapshotReader, SnapshotWriter
from vmm_reference.state.format import FormatError
from vmm_reference.state.testing import COMPUTE, PIECES, Remains, undisturbed

pytestmark = pytest.mark.kvm

WAYS = ("eager", "copy-on-write", "on-demand")

FOREVER = "1: incl 0x300000; jmp 1b"


def interrupted(
    config: MachineConfig, folder: Path, how: str, rounds: int, *, differences: bool, live: bool
) -> tuple[Remains, bytes]:
    """Run with a snapshot, the end of the machine and a restore, again and again.

    With `live` the guest runs while it is saved, and what it does behind that never happened.
    """
    chance = random.Random(rounds * 8 + WAYS.index(how) * 4 + differences * 2 + live)
    machine, output = Machine(config), b""
    base: Path | None = None
    for number in range(rounds):
        with machine:
            machine.console.send("g")  # at most a piece each time: it can't end
            time.sleep(chance.uniform(0, 0.02))
            if not live:
                machine.pause()
            target = folder / str(number)
            machine.snapshot(target, base=base, track=differences)
            output += machine.console._output
        base = target if differences else None
        machine = Machine.restore(target, how, track=differences)
    with machine:
        machine.console.send("g" * (rounds + PIECES))
        assert machine.wait(60) is Outcome.POWER_OFF
        return Remains.of(machine), bytes(output + machine.console._output)


@pytest.mark.parametrize("live", [False, True], ids=["paused", "live"])
@pytest.mark.parametrize("differences", [False, True], ids=["whole", "differences"])
@pytest.mark.parametrize("how", WAYS)
def test_the_end_is_that_of_an_uninterrupted_twin(
    config: Callable[..., MachineConfig],
    twin: tuple[Remains, bytes],
    tmp_path: Path,
    how: str,
    differences: bool,
    live: bool,
) -> None:
    """Memory and registers, after many snapshots; and what came out, none lost, none twice."""
    found = interrupted(config(COMPUTE), tmp_path, how, 8, differences=differences, live=live)
    assert found[0] == twin[0]
    if not live:
        assert found[1] == twin[1]


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("differences", [False, True], ids=["whole", "differences"])
@pytest.mark.parametrize("how", WAYS)
def test_a_thousand_restores_change_nothing(
    config: Callable[..., MachineConfig], tmp_path: Path, how: str, differences: bool
) -> None:
    """The same with a longer computation."""
    source = COMPUTE.replace("$0xC000", f"${(1000 + PIECES) << 11}")
    wanted = undisturbed(tmp_path / "twin", source, 1000 + PIECES)
    found = interrupted(config(source), tmp_path, how, 1000, differences=differences, live=False)
    assert found == wanted


def test_all_ways_give_the_same_memory(
    config: Callable[..., MachineConfig], tmp_path: Path
) -> None:
    """Compared page by page, before the guest runs on; and every digest fits."""
    with Machine(config(COMPUTE)) as machine:
        time.sleep(0.05)
        machine.pause()
        machine.snapshot(tmp_path / "a", track=True)
        machine.resume()
        time.sleep(0.02)
        machine.pause()
        machine.snapshot(tmp_path / "b", base=tmp_path / "a")
        board = machine._board
        assert board is not None
        snapshot.verify(tmp_path / "b")
        snapshot.merge(tmp_path / "b", tmp_path / "c")
        for folder in ("b", "c"):
            for how in WAYS:
                restored = snapshot.open_snapshot(tmp_path / folder, snapshot.Restore(how), {})
                if restored.filler is not None:
                    restored.filler.start()
                assert list(compare(board.memory, restored.memory)) == []
                restored.discard()
    with pytest.raises(HostError, match="does not run"):
        machine.snapshot(tmp_path / "d")


def test_a_difference_brings_no_huge_page_over_what_is_to_come(
    config: Callable[..., MachineConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the host gives huge pages unasked: what surrounds a changed page comes on demand."""
    write = "movl $0x200000, %edi; movl $0x200000, %ecx; movl $1, %eax; rep stosl; PUT 'x';"
    with Machine(config(write + FOREVER)) as machine:
        machine.console.expect("x", 30)
        machine.snapshot(tmp_path / "a", track=True)
        time.sleep(0.02)
        machine.pause()
        machine.snapshot(tmp_path / "b", base=tmp_path / "a")
        board = machine._board
        assert board is not None
        sound = GuestMemory.from_ranges

        def always(ranges: Any, *, options: Options | None = None, **rest: Any) -> GuestMemory:
            options = options or Options()
            if options.transparent_hugepages is None:
                options = attrs.evolve(options, transparent_hugepages=True)
            return sound(ranges, options=options, **rest)

        monkeypatch.setattr(GuestMemory, "from_ranges", always)
        restored = snapshot.open_snapshot(tmp_path / "b", snapshot.Restore.ON_DEMAND, {})
        assert restored.filler is not None
        restored.filler.start()
        assert list(compare(board.memory, restored.memory)) == []
        restored.discard()


def test_a_difference_is_small_and_a_whole_one_sparse(
    config: Callable[..., MachineConfig], tmp_path: Path
) -> None:
    """Neither holds what is zero or unchanged."""
    fill = "movl $0x400000, %edi; movl $0x40000, %ecx; movl $1, %eax; rep stosl; PUT 'x';"
    with Machine(config(fill + FOREVER)) as machine:
        machine.console.expect("x", 30)
        machine.snapshot(tmp_path / "a", track=True)
        machine.snapshot(tmp_path / "b", base=tmp_path / "a", track=True)
        whole, difference = (
            sum(path.stat().st_blocks for path in (tmp_path / name).rglob("memory")) * 512
            for name in "ab"
        )
        assert difference <= 64 << 10 < 1 << 20 < whole < 2 << 20
        with pytest.raises(HostError, match="what changed is known since"):
            machine.snapshot(tmp_path / "c", base=tmp_path / "a")
        with pytest.raises(HostError, match="the base itself"):
            machine.snapshot(tmp_path / "b", base=tmp_path / "b")
        machine.snapshot(tmp_path / "c", base=tmp_path / "b")
        with pytest.raises(HostError, match="track=True"):
            machine.snapshot(tmp_path / "d", base=tmp_path / "c")
    for name in "abc":
        snapshot.verify(tmp_path / name)


@attrs.frozen
class FirstDigests:
    """How the first release wrote the digests of memory."""

    sha256: tuple[str, ...]
    version: int = 1


def test_a_snapshot_of_the_first_release_is_read_and_built_upon(
    config: Callable[..., MachineConfig], tmp_path: Path
) -> None:
    """Its digests are SHA-256: compared, and gone on with in a difference."""
    with Machine(config(FOREVER)) as machine:
        machine.pause()
        machine.snapshot(tmp_path / "a")
    with (
        SnapshotReader(tmp_path / "a") as reader,
        SnapshotWriter(tmp_path / "old") as writer,
        snapshot.open_snapshot(tmp_path / "a", snapshot.Restore.EAGER, {}).memory as memory,
    ):
        plain = pages.MemoryDigests(
            reader.state("digests", pages.MemoryDigests).chunks, pages.Algorithm.SHA256
        )
        everything = [(r.guest_address, r.size) for r in pages.describe(memory)]
        found = pages.store(memory, writer.memory, plain, everything)
        for name in reader.names():
            if name == "digests":
                writer.add(name, FirstDigests(found.chunks))
            else:
                writer.copy(name, reader)
        writer.commit("0")
    with Machine.restore(tmp_path / "old", "eager", track=True) as machine:
        time.sleep(0.02)
        machine.snapshot(tmp_path / "new", base=tmp_path / "old")
    snapshot.verify(tmp_path / "new")
    with SnapshotReader(tmp_path / "new") as reader:
        digests = reader.state("digests", pages.MemoryDigests)
    assert digests.algorithm is pages.Algorithm.SHA256
    assert all(len(digest) == 64 for digest in digests.chunks)


def test_a_machine_goes_on_after_a_snapshot(
    config: Callable[..., MachineConfig], twin: tuple[Remains, bytes], tmp_path: Path
) -> None:
    """Many while it runs: it ends as if there had been none, and each is whole."""
    with Machine(config(COMPUTE)) as machine:
        for _ in range(PIECES - 1):
            machine.console.send("g")
            machine.snapshot(tmp_path / "a")
            snapshot.verify(tmp_path / "a")
        machine.console.send("g")
        assert machine.wait(60) is Outcome.POWER_OFF
        assert (Remains.of(machine), bytes(machine.console._output)) == twin


def test_what_is_corrupt_is_refused_before_anything_starts(
    config: Callable[..., MachineConfig], tmp_path: Path
) -> None:
    """A bit of the memory, a part that is gone, a part of another machine."""
    with Machine(config(COMPUTE)) as machine:
        time.sleep(0.02)
        machine.snapshot(tmp_path / "a")
    (path,) = (tmp_path / "a").rglob("memory")
    chance = random.Random(1)
    with path.open("r+b") as file:
        for _ in range(20):
            place = chance.randrange(path.stat().st_size)
            sound = os.pread(file.fileno(), 1, place)
            os.pwrite(file.fileno(), bytes([sound[0] ^ 1 << chance.randrange(8)]), place)
            with pytest.raises(FormatError, match="memory at 0x"):
                Machine.restore(tmp_path / "a", "eager")
            os.pwrite(file.fileno(), sound, place)
    snapshot.verify(tmp_path / "a")
    (part,) = (tmp_path / "a").rglob("vcpu0.json")
    part.unlink()
    with pytest.raises(HostError, match="vcpu0"):
        Machine.restore(tmp_path / "a")


def test_memory_that_cannot_be_had_ends_the_machine(
    config: Callable[..., MachineConfig], tmp_path: Path
) -> None:
    """Restored on demand, and then the file is cut: the outcome says so, nothing hangs."""
    with Machine(config(FOREVER)) as machine:
        machine.console.send("x")
        time.sleep(0.02)
        machine.snapshot(tmp_path / "a")
    (path,) = (tmp_path / "a").rglob("memory")
    machine = Machine.restore(tmp_path / "a", "on-demand")
    os.truncate(path, 1 << 16)
    with machine:
        assert machine.wait(30) is Outcome.HOST_FAILURE
        assert "memory's file at 0x" in machine.detail


def test_another_machines_devices_are_refused(
    config: Callable[..., MachineConfig], tmp_path: Path
) -> None:
    """An override that adds a device: the states fit no more, and the error names the devices."""
    image = tmp_path / "disk"
    image.write_bytes(bytes(1 << 20))
    with Machine(config(FOREVER)) as machine:
        machine.snapshot(tmp_path / "a")
    more = Machine.restore(tmp_path / "a", drives=[Drive(str(image))])
    with pytest.raises(FormatError, match=r"manifest\.parts.*drive0"), more:
        pass


@pytest.mark.parametrize("how", WAYS)
def test_another_cpus_guest_is_refused_before_anything_starts(
    config: Callable[..., MachineConfig], tmp_path: Path, how: str
) -> None:
    """The feature that is missing is named, by the library, the template and the command."""
    with Machine(config(FOREVER)) as machine:
        machine.snapshot(tmp_path / "a")
    with (
        SnapshotReader(tmp_path / "a") as reader,
        SnapshotWriter(tmp_path / "b") as writer,
    ):
        for name in reader.names():
            if name != "vcpu0":
                writer.copy(name, reader)
                continue
            state = reader.state(name, VcpuState)
            cpuid = tuple(
                attrs.evolve(entry, ebx=entry.ebx | 1 << 31)
                if entry.function == 0x80000008
                else entry
                for entry in state.cpuid
            )
            writer.add(name, attrs.evolve(state, cpuid=cpuid))
        with (tmp_path / "a").joinpath(reader.manifest.generation, "memory").open("rb") as memory:
            os.sendfile(writer.memory, memory.fileno(), 0, reader.manifest.memory_size)
        writer.commit("0")
    said = r"lacks what the guest uses: cpuid 0x80000008\.0 ebx bit 31"
    with pytest.raises(HostError, match=said):
        Machine.restore(tmp_path / "b", how)
    for command in ("-m vmm_reference restore", "-m vmm_reference clone"):
        done = subprocess.run(
            [sys.executable, *command.split(), str(tmp_path / "b")],
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert done.returncode == 1
        assert re.search(said, done.stderr), done.stderr
        assert "Traceback" not in done.stderr


FULL = """
import errno, os, subprocess, sys
from pathlib import Path
from vmm_reference import Machine, MachineConfig
from vmm_reference.backends.overlay import Overlay
from vmm_reference.errors import HostError
from vmm_reference.state import snapshot
room = Path(sys.argv[2])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", room], check=True)
with Machine(MachineConfig(kernel=sys.argv[1], memory="32M")) as machine:
    machine.console.expect("x", 60)
    machine.pause()
    machine.snapshot(room / "a")
    # The next has no room beside it, at any of its parts: from all of memory to the last file.
    refused = 0
    for free in range(0, 1500000, 100000):
        left = os.statvfs(room).f_bavail * 4096
        (room / "rest").write_bytes(bytes(max(left - free, 0)))
        try:
            machine.snapshot(room / "a")
        except (HostError, OSError) as error:
            assert "No space left" in str(error), error
            refused += 1
        (room / "rest").unlink()
        snapshot.verify(room / "a")
    machine.resume()
    assert machine.outcome is None
(room / "base").write_bytes(bytes(range(256)) * 256)
overlay = Overlay(str(room / "base"), str(room))
overlay.write(0, [memoryview(b"new" + bytes(509))])
left = os.statvfs(room).f_bavail * 4096
(room / "rest").write_bytes(bytes(left))
try:
    overlay.write(32768, [memoryview(b"more" * 1024)])
except OSError as error:
    assert error.errno == errno.ENOSPC
else:
    raise SystemExit("it was written, where there is no room")
found = bytearray(65536)
overlay.read(0, [memoryview(found)])
assert found[:3] == b"new" and found[4096:] == bytes(range(256)) * 240
(room / "rest").unlink()
overlay.write(32768, [memoryview(b"more" * 1024)])
print(refused)
"""


def test_a_disk_without_room_leaves_the_old_snapshot_and_what_an_overlay_has(
    config: Callable[..., MachineConfig], tmp_path: Path
) -> None:
    """A file system of two megabytes, filled up: whatever comes first to have no room."""
    fill = "movl $0x400000, %edi; movl $0x30000, %ecx; movl $1, %eax; rep stosl; PUT 'x';"
    room = tmp_path / "room"
    room.mkdir()
    unshare = ["unshare", "--map-root-user", "--mount"]
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this host lets nobody mount a file system of their own")
    kernel = config(fill + FOREVER).kernel
    done = subprocess.run(
        [*unshare, sys.executable, "-c", FULL, str(kernel), str(room)],
        capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stdout) < 15


def test_a_full_disk_leaves_the_old_snapshot_and_the_guest(
    config: Callable[..., MachineConfig], tmp_path: Path
) -> None:
    """The error says so; the machine runs on, and the snapshot before can be restored."""
    with Machine(config(FOREVER)) as machine:
        machine.snapshot(tmp_path / "a")
        with SnapshotReader(tmp_path / "a") as reader:
            before = reader.digest

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        for name in ("store", "describe"):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(pages, name, full)
                with pytest.raises(OSError, match="No space left"):
                    machine.snapshot(tmp_path / "a")
        assert machine.outcome is None
        machine.pause()
        machine.resume()
    snapshot.verify(tmp_path / "a")
    with SnapshotReader(tmp_path / "a") as reader:
        assert reader.digest == before
    assert len(list((tmp_path / "a").iterdir())) == 2


SAVE_FOR_EVER = """
import sys
from pathlib import Path
from vmm_reference import Machine, MachineConfig
with Machine(MachineConfig(kernel=sys.argv[1], memory="32M")) as machine:
    number = 0
    while True:
        machine.snapshot(sys.argv[2])
        print(number, flush=True)
        number += 1
"""


def test_a_process_that_is_killed_leaves_a_whole_snapshot(
    config: Callable[..., MachineConfig], tmp_path: Path
) -> None:
    """At moments that nobody chose: what is there is proved, and goes on elsewhere."""
    kernel, chance = config(FOREVER).kernel, random.Random(3)
    for _ in range(8):
        command = [sys.executable, "-c", SAVE_FOR_EVER, str(kernel), str(tmp_path / "a")]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"0\n"
            time.sleep(chance.uniform(0, 0.05))
            process.kill()
        snapshot.verify(tmp_path / "a")
        with Machine.restore(tmp_path / "a", chance.choice(WAYS)) as machine:
            machine.snapshot(tmp_path / "a")
        assert len(list((tmp_path / "a").iterdir())) == 2


def test_nothing_is_left_open(config: Callable[..., MachineConfig], tmp_path: Path) -> None:
    """Descriptors and threads after ten snapshots and restores, used or only made."""

    def count() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))  # noqa: PTH208

    def once(how: str) -> None:
        with Machine(config(FOREVER)) as machine:
            machine.snapshot(tmp_path / "a")
        Machine.restore(tmp_path / "a", how).close()
        with Machine.restore(tmp_path / "a", how) as machine:
            machine.snapshot(tmp_path / "b")
        shutil.rmtree(tmp_path / "a")

    once("eager")
    gc.collect()  # what tests before have left
    before = count()
    for number in range(9):
        once(WAYS[number % 3])
    assert count() == before
