"""Control sockets, the verbs that use them, clones, and machines for asyncio."""

import asyncio
import contextlib
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vm_memory import GuestAddress
from vmm_reference import aio, layout
from vmm_reference.api.client import ask
from vmm_reference.api.server import Control, Server
from vmm_reference.backends.overlay import Overlay
from vmm_reference.cli import main
from vmm_reference.config import Drive, MachineConfig
from vmm_reference.devices.blk.model import Block
from vmm_reference.devices.console.setup import Ports
from vmm_reference.devices.debug_console import DebugLog
from vmm_reference.devices.net.setup import Interface
from vmm_reference.devices.pmem import PersistentMemory
from vmm_reference.devices.vmgenid import Generation
from vmm_reference.devices.vsock.setup import Socket
from vmm_reference.errors import ConfigError, HostError
from vmm_reference.machine import Machine
from vmm_reference.outcome import Outcome
from vmm_reference.state.clone import Template, identity
from vmm_reference.state.incoming import Incoming
from vmm_reference.testing import tiny_kernel

# Says a dot when it is told something, and powers off when that is a `q`.
ECHO = """
1:  movw $0x3fd, %dx
    inb %dx, %al
    testb $1, %al
    jz 1b
    movw $0x3f8, %dx
    inb %dx, %al
    cmpb $0x71, %al
    je 2f
    PUT '.'
    jmp 1b
2:  POWER_OFF
"""


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., MachineConfig]:
    def build(**fields: object) -> MachineConfig:
        path = tmp_path / "kernel"
        path.write_bytes(tiny_kernel(ECHO))
        return MachineConfig(kernel=str(path), memory="32M", **fields)  # type: ignore[arg-type]

    return build


def answers(machine: Machine) -> None:
    machine.console.send("x")
    machine.console.expect(r"\.", 60)


def generation(machine: Machine) -> bytes:
    board = machine._board
    assert board is not None
    return board.memory.read(GuestAddress(layout.VM_GENERATION), 16)


@pytest.mark.kvm
def test_the_verbs_act_on_a_running_machine(
    config: Callable[..., MachineConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pause, resume, snapshot, merge and migrate, by the command line."""
    path = str(tmp_path / "api")
    with Machine(config(devices=[Generation()])) as machine:
        answers(machine)
        with Server(path, Control(machine)):
            assert ask(path, "GET", "/", {})["state"] == "Running"
            assert main(["pause", path]) == 0
            assert ask(path, "GET", "/", {})["state"] == "Paused"
            assert main(["resume", path]) == 0
            answers(machine)
            whole, later = str(tmp_path / "whole"), str(tmp_path / "later")
            assert main(["snapshot", path, whole, "--track"]) == 0
            assert main(["snapshot", path, later, "--base", whole]) == 0
            assert main(["merge", later, str(tmp_path / "merged")]) == 0
            before = generation(machine)
            with Incoming("tcp:127.0.0.1:0") as incoming:
                assert main(["migrate", path, incoming.address, "--streams", "2"]) == 0
                assert "downtime" in capsys.readouterr().out
                with incoming.receive(30) as there:
                    answers(there)
                    assert generation(there) == before  # it is no copy
            assert ask(path, "GET", "/", {})["outcome"] == "migrated"
            assert main(["migrate", path, "--recover"]) == 1
            assert main(["migrate", path, "--resolve"]) == 1
            assert main(["migrate", path]) == 2
    assert main(["pause", path]) == 2  # there is no such socket now
    with Machine.restore(tmp_path / "merged") as machine:
        answers(machine)


@pytest.mark.kvm
def test_requests_that_make_no_sense_are_refused(
    config: Callable[..., MachineConfig], tmp_path: Path
) -> None:
    """Named, and the machine goes on."""
    path = str(tmp_path / "api")
    with Machine(config()) as machine, Server(path, Control(machine)):
        for method, target, body in (
            ("GET", "/nothing", {}),
            ("PATCH", "/vm", {"state": "Upside down"}),
            ("PATCH", "/vm", {"state": ["Paused"]}),
            ("PATCH", "/vm", {"status": "Paused"}),
            ("PUT", "/snapshot/create", {}),
            ("PUT", "/snapshot/create", {"snapshot_path": "x", "track": 1}),
            ("PUT", "/migration", {"address": "nowhere"}),
            ("PUT", "/migration", {"address": "unix:/nowhere", "speed": 1}),
            ("PUT", "/migration", {"address": "unix:/nowhere", "streams": "x"}),
            ("PUT", "/migration", {"address": "unix:/nowhere"}),
        ):
            with pytest.raises(HostError, match="refuses"):
                ask(path, method, target, body)
        with pytest.raises(HostError, match="control socket"):
            Server(path, Control(machine))
        answers(machine)
    with pytest.raises(HostError, match="api-socket"):
        ask(path, "GET", "/", {})


@pytest.mark.kvm
def test_a_vmm_waits_for_a_machine(config: Callable[..., MachineConfig], tmp_path: Path) -> None:
    """`vmm run --incoming`, a process of its own, with the console on its streams."""
    address, path = f"unix:{tmp_path / 'in'}", str(tmp_path / "api")
    command = [sys.executable, "-m", "vmm_reference", "run", "--incoming", address,
               "--api-socket", path]  # fmt: skip
    with (
        Machine(config()) as machine,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process,
    ):
        assert process.stderr is not None
        assert process.stdin is not None
        assert process.stdout is not None
        assert b"waiting" in process.stderr.readline()
        answers(machine)
        machine.migrate(address)
        process.stdin.write(b"x")
        process.stdin.flush()
        assert process.stdout.read(1) == b"."
        process.stdin.write(b"q")
        process.stdin.flush()
        assert process.wait(60) == 0


@pytest.mark.kvm
@pytest.mark.parametrize("how", ["eager", "copy-on-write", "on-demand"])
def test_a_command_restores_a_machine(
    config: Callable[..., MachineConfig], tmp_path: Path, how: str
) -> None:
    """`vmm restore`, a process of its own: with other drives, and a control socket."""
    images = []
    for name in ("first", "second"):
        images.append(tmp_path / name)
        images[-1].write_bytes(bytes(4096))
    with Machine(config(drives=[Drive(str(images[0]))], devices=[Generation()])) as machine:
        answers(machine)
        machine.snapshot(tmp_path / "a")
    api = str(tmp_path / "api")
    command = [sys.executable, "-m", "vmm_reference", "restore", str(tmp_path / "a"), "--how", how,
               "--track", "--drive", str(images[1]), "--api-socket", api]  # fmt: skip
    images[0].unlink()
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"x")
        process.stdin.flush()
        assert process.stdout.read(1) == b"."
        while not Path(api).exists():
            assert process.poll() is None
            time.sleep(0.01)
        assert main(["snapshot", api, str(tmp_path / "b"), "--base", str(tmp_path / "a")]) == 0
        process.stdin.write(b"q")
        process.stdin.flush()
        assert process.wait(60) == 0
    assert main(["restore", str(tmp_path / "a"), "--drive", "/nowhere"]) == 2
    assert main(["restore", str(tmp_path)]) == 1


def test_a_clone_has_what_only_one_can_have(tmp_path: Path) -> None:
    """Addresses that count on, and names, sockets and files with the clone's number."""
    image = tmp_path / "disk"
    image.write_bytes(bytes(4096))
    (tmp_path / "kernel").write_bytes(tiny_kernel(ECHO))
    (tmp_path / "pmem").write_bytes(bytes(2 << 20))
    config = MachineConfig(
        kernel=str(tmp_path / "kernel"),
        drives=[Drive(str(image), engine="sync"), Drive(str(image), read_only=True)],
        devices=[
            Interface(tap="tap0", mac="02:00:00:ff:ff:ff"),
            Interface(ports="2222:22 80"),
            Interface(socket="/a", peer="/b"),
            Socket("/run/v.sock", cid=7),
            Socket(vhost=True, cid=70),
            Ports("pty agent=socket:/run/agent pty:/run/link file:/log tty:/dev/tty9"),
            DebugLog("/run/debug"),
            PersistentMemory(str(tmp_path / "pmem")),
            Generation(),
        ],
    )
    fields = identity(config, 4)
    clone = attrs.evolve(config, **fields)
    writable, shared = clone.drives
    assert writable.overlay
    assert shared == config.drives[1]
    tap, passt, cable, vsock, vhost, ports, log, memory, _ = clone.devices
    assert memory == PersistentMemory(str(tmp_path / "pmem"), private=True)
    assert isinstance(tap, Interface)
    assert (tap.tap, tap.mac) == ("tap0-4", "02:00:00:00:00:04")
    assert isinstance(passt, Interface)
    assert passt.ports == "2227:22 85:80"
    assert re.fullmatch("02(:[0-9a-f]{2}){5}", passt.mac)
    assert isinstance(cable, Interface)
    assert (cable.socket, cable.peer) == ("/a-4", "/b-4")
    assert vsock == Socket("/run/v.sock-4", cid=12)
    assert vhost == Socket(vhost=True, cid=75)
    assert isinstance(ports, Ports)
    assert ports.ports == (
        "pty agent=socket:/run/agent-4 pty:/run/link-4 file:/log-4 tty:/dev/tty9"
    )
    assert log == DebugLog("/run/debug-4")


@pytest.mark.kvm
def test_forks_share_what_none_of_them_writes(
    config: Callable[..., MachineConfig], tmp_path: Path
) -> None:
    """Each has its own generation and its own disk; the first goes on."""
    image = tmp_path / "disk"
    image.write_bytes(bytes(1 << 20))
    with Machine(
        config(drives=[Drive(str(image), read_only=True)], devices=[Generation()])
    ) as machine:
        answers(machine)
        clones = machine.fork(3, tmp_path / "fork")
        with contextlib.ExitStack() as stack:
            for clone in clones:
                stack.enter_context(clone)
            for clone in [*clones, machine]:
                answers(clone)
            seen = {generation(each) for each in [*clones, machine]}
            assert len(seen) == 4
            for clone in clones:
                clone.console.send("q")
                assert clone.wait(60) is Outcome.POWER_OFF


@pytest.mark.kvm
@pytest.mark.parametrize("engine", ["sync", "python"])
def test_forks_have_drives_as_they_were(
    config: Callable[..., MachineConfig], tmp_path: Path, engine: str
) -> None:
    """The machine keeps its image and writes on; each fork has that of the moment for itself."""
    image = tmp_path / "disk"
    image.write_bytes(b"then".ljust(4 << 20, b"\1") + bytes(4 << 20))

    def word(machine: Machine, written: bytes = b"") -> bytes:
        """What the drive begins with, after writing there."""
        assert machine._board is not None
        slot = machine._board.devices["drive0"].slot
        assert slot is not None
        assert isinstance(slot.device.model, Block)
        backend, data = slot.device.model.backend, bytearray(4)
        if written:
            backend.write(0, [memoryview(written)])
        backend.read(0, [memoryview(data)])
        return bytes(data)

    with Machine(config(drives=[Drive(str(image), engine=engine)])) as machine:
        answers(machine)
        clones = machine.fork(2, tmp_path / "a")
        with image.open("r+b") as file:
            file.write(b"next")
        later = machine.fork(1, tmp_path / "b")
        with contextlib.ExitStack() as stack:
            for clone in (*clones, *later):
                stack.enter_context(clone)
            for clone in [*clones, *later, machine]:
                answers(clone)
            assert [word(clone) for clone in (*clones, *later)] == [b"then", b"then", b"next"]
            assert word(clones[0], b"mine") == b"mine"
            assert word(clones[1]) == b"then"
    assert image.read_bytes() == b"next".ljust(4 << 20, b"\1") + bytes(4 << 20)


CLONE = """
import os, sys
from vmm_reference.state.clone import Template
def run(machine):
    with machine:
        machine.console.send("x")
        machine.console.expect(r"\\\\.", 60)
        machine.console.send("q")
        return machine.wait(60).status
with Template(sys.argv[1]) as template:
    children = [template.fork(number, run) for number in range(10)]
    assert all(os.waitpid(child, 0)[1] == 0 for child in children)
"""


@pytest.mark.kvm
def test_a_template_forks_machines(config: Callable[..., MachineConfig], tmp_path: Path) -> None:
    """Ten, each in a process of its own."""
    with Machine(config()) as machine:
        machine.snapshot(tmp_path / "a")
        with pytest.raises(HostError, match="template: this process has"):
            Template(tmp_path / "a")
    source = CLONE.replace("\\\\", "\\")
    subprocess.run([sys.executable, "-c", source, str(tmp_path / "a")], check=True, timeout=100)


@pytest.mark.kvm
def test_vmm_clone_runs_them_until_they_end(
    config: Callable[..., MachineConfig], tmp_path: Path
) -> None:
    """With a control socket each, and a log that has what the guest says when it says it."""
    always = config()
    (tmp_path / "kernel").write_bytes(
        tiny_kernel("1: movl $9999, %ecx; 2: loop 2b; PUT 'x'; jmp 1b")
    )
    with Machine(always) as machine:
        machine.snapshot(tmp_path / "a")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "vmm_reference", "clone", str(tmp_path / "a"), "-n", "3",
               "--run-folder", str(out)]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        for number in range(3):
            path = out / f"{number}.sock"
            while not path.exists():
                assert process.poll() is None
                time.sleep(0.01)
            assert ask(str(path), "GET", "/", {})["state"] == "Running"
            while not (out / f"{number}.log").read_text().endswith("x"):
                assert process.poll() is None
                time.sleep(0.01)
        process.terminate()
        assert process.wait(60) == Outcome.STOPPED.status
    assert len(list(out.glob("*.log"))) == 3


@pytest.mark.kvm
def test_clones_of_a_drive_that_is_in_use_are_refused_in_a_line(
    config: Callable[..., MachineConfig], tmp_path: Path
) -> None:
    """Its machine may write it while they read it."""
    image = tmp_path / "disk"
    image.write_bytes(bytes(1 << 20))
    command = [sys.executable, "-m", "vmm_reference", "clone", str(tmp_path / "a"),
               "--run-folder", str(tmp_path)]  # fmt: skip
    with Machine(config(drives=[Drive(str(image))])) as machine:
        machine.snapshot(tmp_path / "a")
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    said = f"clone 0: drive {image}: another machine uses it; stop that machine"
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.kvm
def test_machines_are_awaited(config: Callable[..., MachineConfig], tmp_path: Path) -> None:
    """The same names, with await."""

    async def use() -> None:
        async with aio.Machine(config()) as machine:
            machine.machine.console.send("x")
            await machine.expect(r"\.")
            await machine.pause()
            await machine.resume()
            await machine.snapshot(tmp_path / "a")
            with pytest.raises(TimeoutError):
                await machine.wait(0.1)
            with Incoming("tcp:127.0.0.1:0") as incoming:
                report = await machine.migrate(incoming.address)
                assert report.downtime > 0
                there = aio.Machine(machine=await asyncio.to_thread(incoming.receive, 30))
                async with there:
                    there.machine.console.send("q")
                    assert await there.wait(60) is Outcome.POWER_OFF
        async with await aio.Machine.restore(tmp_path / "a") as machine:
            (clone,) = await machine.fork(1, tmp_path / "b")
            async with clone:
                clone.machine.console.send("x")
                await clone.expect(r"\.")

    asyncio.run(use())


def test_an_overlay_is_refused_where_it_would_be_left_behind(tmp_path: Path) -> None:
    """With read_only, or a folder that is none."""
    image = tmp_path / "disk"
    image.write_bytes(bytes(4096))
    for drive in (
        Drive(str(image), overlay="/nowhere"),
        Drive(str(image), read_only=True, overlay=str(tmp_path)),
    ):
        with pytest.raises(ConfigError, match="overlay"):
            drive.check("drive")


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 40),
    steps=st.lists(st.tuples(st.booleans(), st.integers(0, 39), st.integers(1, 20)), max_size=30),
    seed=st.integers(0, 1000),
)
def test_an_overlay_is_a_disk(
    tmp_path_factory: pytest.TempPathFactory,
    size: int,
    steps: list[tuple[bool, int, int]],
    seed: int,
) -> None:
    """Against bytes in memory; and the base stays as it was."""
    folder, chance = tmp_path_factory.mktemp("overlay"), random.Random(seed)
    base = chance.randbytes(size * 512)
    (folder / "base").write_bytes(base)
    model, overlay = bytearray(base), Overlay(str(folder / "base"), str(folder))
    for write, sector, count in steps:
        start, end = min(sector, size - 1) * 512, min(sector + count, size) * 512
        end = max(end, start + 512)
        if write:
            data = chance.randbytes(end - start)
            model[start:end] = data
            half = len(data) // 2
            overlay.write(start, [memoryview(data)[:half], memoryview(data)[half:]])
        else:
            overlay.write_zeroes(start, end - start, unmap=True)
            model[start:end] = bytes(end - start)
        found = bytearray(size * 512)
        overlay.read(0, [memoryview(found)])
        assert found == model
    overlay.close()
    assert (folder / "base").read_bytes() == base
