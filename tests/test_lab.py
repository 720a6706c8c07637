"""The lab itself: what a command finds in it, and that it neither hangs nor leaves anything."""

from __future__ import annotations

import mmap
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lab.cpus import runtime_folder
from lab.direct import Direct
from lab.errors import LabError, LabTimeout
from lab.lab import Lab

pytestmark = [pytest.mark.linux, pytest.mark.timeout(600)]

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def lab(linux: Lab | Direct, share: Path) -> Iterator[Lab]:
    """A kept lab, the one of the other tests where they need one too."""
    if isinstance(linux, Lab):
        yield linux
        return
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("qemu-system-x86_64 is not here to make a lab with")
    with Lab(shares=[share]) as own:
        yield own


@pytest.fixture
def room(lab: Lab) -> None:
    """A CPU for a lab of the test's own: the kept one ends, and boots again for its next job."""
    lab.stop()


PATIENCE = 500
"""Seconds until a lab of a test's own runs: the labs of other tests may have all CPUs first."""


def wait_for(what: Callable[[], bool], seconds: float = PATIENCE) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)


def ended(pid: int) -> bool:
    """Whether a process has ended; a zombie has."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


def test_a_command_gets_its_input_and_gives_its_output_errors_and_status(lab: Lab) -> None:
    """The three streams and the exit status pass as they would on the host."""
    done = lab.run(["sh", "-c", "cat; echo wrong >&2; exit 7"], input="right\n")
    assert (done.stdout, done.stderr, done.returncode) == ("right\n", "wrong\n", 7)


def test_much_input_and_output_pass_unchanged(lab: Lab) -> None:
    """Megabytes go both ways at once, whatever their bytes are."""
    text = "".join(f"{number:07d}\n" for number in range(1 << 17))
    assert lab.run(["cat"], input=text).stdout == text


def test_input_that_nobody_reads_does_not_keep_a_command_from_ending(lab: Lab) -> None:
    """A command may end, or be ended, while its input waits for it."""
    assert lab.run(["true"], input=bytes(1 << 20)).returncode == 0
    with lab.popen(["sleep", "100"]) as job:
        job.write(bytes(1 << 20))
        job.send_signal(signal.SIGTERM)
        assert job.wait() == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("argv", "status"),
    [
        (["/no/such/program"], 127),
        (["no-such-program"], 127),
        (["/etc/hostname"], 126),
        (["sh", "-c", "kill -TERM $$"], 128 + signal.SIGTERM),
    ],
)
def test_a_command_that_cannot_run_or_dies_has_the_status_that_shells_give(
    lab: Lab, argv: list[str], status: int
) -> None:
    """126, 127 and 128 + n mean here what they mean everywhere."""
    done = lab.run(argv)
    assert done.returncode == status
    assert ("lab: " in done.stderr) == (status < 128)


def test_environment_and_working_directory_are_the_callers(lab: Lab, tmp_path: Path) -> None:
    """Both are carried into the job, or are what the caller gives."""
    script = 'echo "$HOME:$PATH:$PWD"'
    here = lab.run(["sh", "-c", script]).stdout.strip()
    assert here == f"{os.environ['HOME']}:{os.environ['PATH']}:{Path.cwd()}"
    done = lab.run(["/usr/bin/env"], env={"ONE": "1\n2", "odd name": "x"}, cwd=tmp_path)
    assert done.stdout == "ONE=1\n2\nodd name=x\n"
    assert lab.run(["pwd"], cwd=tmp_path).stdout == f"{tmp_path}\n"


def test_each_job_sees_the_hosts_files_as_they_are_now(lab: Lab, tmp_path: Path) -> None:
    """Files that were changed, replaced, added or removed between two jobs, also under /tmp."""
    changed, replaced, removed, added = (tmp_path / name for name in ("c", "p", "r", "a"))
    for path in (changed, replaced, removed):
        path.write_text("old\n")
    command = ["sh", "-c", "for f in c p r a; do cat $f 2>/dev/null || echo none; done"]
    assert lab.run(command, cwd=tmp_path).stdout.split() == ["old", "old", "old", "none"]
    os.utime(changed, ns=(0, 0))
    changed.write_text("new\n")
    (tmp_path / "fresh").write_text("new\n")
    (tmp_path / "fresh").rename(replaced)
    removed.unlink()
    added.write_text("new\n")
    assert lab.run(command, cwd=tmp_path).stdout.split() == ["new", "new", "none", "new"]


def test_a_program_that_is_kept_in_memory_is_replaced_when_the_host_changes_it(
    lab: Lab, tmp_path: Path
) -> None:
    """What this process maps is kept in the lab from job to job, but never longer than it is so."""
    program = tmp_path / "program"
    for word in ("first", "second"):
        program.write_text(f"#!/bin/sh\necho {word}\n")
        program.chmod(0o755)
        with program.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ | mmap.PROT_EXEC)
        for _ in range(2):
            assert lab.run([program]).stdout == f"{word}\n"
        mapped.close()
    program.unlink()
    assert lab.run([program]).returncode == 127


def test_what_a_job_writes_is_gone_at_its_end_except_in_shared_folders(
    lab: Lab, share: Path, tmp_path: Path
) -> None:
    """The host's files are never changed, nor is one job's scratch another's."""
    (tmp_path / "file").write_text("host\n")
    script = f"echo lab >{tmp_path}/file; echo lab >/tmp/lab-wrote; echo lab >{share}/result"
    assert lab.run(["sh", "-c", script]).returncode == 0
    assert (tmp_path / "file").read_text() == "host\n"
    assert not Path("/tmp/lab-wrote").exists()
    assert lab.run(["test", "-e", "/tmp/lab-wrote"]).returncode == 1
    assert (share / "result").read_text() == "lab\n"
    (share / "result").write_text("host\n")
    assert lab.run(["cat", share / "result"]).stdout == "host\n"


def test_unix_sockets_can_be_bound_where_programs_bind_them(lab: Lab, tmp_path: Path) -> None:
    """In /run, in /tmp and in a folder of the host's below it, to be connected to by path."""
    script = """
import socket, sys
for path in sys.argv[1:]:
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen()
    socket.socket(socket.AF_UNIX).connect(path)
    print(path)
"""
    paths = ["/run/socket", "/tmp/socket", f"{tmp_path}/socket", "/dev/shm/socket"]
    done = lab.run([sys.executable, "-I", "-S", "-c", script, *paths])
    assert done.stdout.split() == paths, done.stderr


def test_nothing_of_a_job_outlives_it(lab: Lab) -> None:
    """What it leaves in the background is ended with it, and holds nothing up."""
    assert lab.run(["sh", "-c", "setsid sleep 1000 & sleep 1001 & exit 3"]).returncode == 3
    assert "sleep" not in lab.run(["ps", "ax"]).stdout


def test_output_comes_while_the_job_runs_and_input_goes_to_it(lab: Lab) -> None:
    """A test can talk to a job: wait for a line, answer, wait again."""
    script = 'echo name?; read name; echo "hello $name"; read rest; exit 4'
    with lab.popen(["sh", "-c", script]) as job:
        job.read_until("name\\?\n")
        job.write("lab\n")
        assert job.read_until("hello .*\n") == "hello lab\n"
        job.close_stdin()
        assert job.wait() == 4
        with pytest.raises(LabError, match="ended with status 4"):
            job.read_until("more")


def test_a_job_on_a_terminal_controls_it(lab: Lab) -> None:
    """It has a size, echoes, and turns keys into signals."""
    with lab.popen(["sh", "-i"], pty=True, env=os.environ | {"PS1": "$ "}) as job:
        job.resize(50, 132)
        job.read_until(r"\$ ")
        job.write("stty size; tty\r")
        assert "50 132\r\n/dev/pts/" in job.read_until(r"pts/\d+\r\n\$ ")
        job.write("sleep 100; echo woken $?\r")
        job.read_until("\r\n")
        time.sleep(0.5)
        job.write("\x03")
        job.read_until(r"\$ ")
        job.write("exit 9\r")
        assert job.wait() == 9


def test_a_job_that_takes_too_long_is_ended_and_the_lab_goes_on(lab: Lab) -> None:
    """The timeout tells what the job had written."""
    with pytest.raises(LabTimeout, match="began"):
        lab.run(["sh", "-c", "echo began; sleep 1000"], timeout=2)
    assert lab.run(["echo", "on"]).stdout == "on\n"


def test_a_lab_runs_one_job_at_a_time(lab: Lab) -> None:
    """A second job is refused, and the first goes on."""
    with lab.popen(["cat"]) as job:
        with pytest.raises(LabError, match="one job at a time"):
            lab.run(["true"])
        job.write("still here\n")
        job.read_until("here\n")


def test_a_kept_lab_serves_job_after_job_without_booting_again(lab: Lab) -> None:
    """The outer kernel is the same one, and so is the emulator."""
    lab.start()
    emulator = lab.pid
    kernels = {lab.run(["cat", "/proc/sys/kernel/random/boot_id"]).stdout for _ in range(3)}
    assert len(kernels) == 1, kernels
    assert lab.pid == emulator


def test_all_threads_of_the_emulator_are_pinned_to_the_labs_cpu(lab: Lab) -> None:
    """A single one beside it would bring the lost interrupts back."""
    lab.start()
    masks = set()
    for task in Path(f"/proc/{lab.pid}/task").iterdir():
        status = (task / "status").read_text()
        masks |= set(re.findall(r"^Cpus_allowed_list:\s*(\S+)", status, re.MULTILINE))
    assert masks == {str(lab.cpu)}


def test_a_stress_that_freezes_unpinned_labs_is_survived(lab: Lab, tmp_path: Path) -> None:
    """A minute of interrupt windows and timers, in which no timer interrupt is lost."""
    program = tmp_path / "stress"
    source = HERE / "lab" / "stress.c"
    subprocess.run(
        ["gcc", "-O2", "-Wall", "-Werror", "-pthread", "-o", program, source], check=True
    )
    before = list(lab.restarted)
    with lab.popen([program, "1000"]) as job:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            assert int(job.read_until(r"\n")) > 0, job.stderr
    assert lab.run(["true"]).returncode == 0
    assert lab.restarted == before


def test_two_labs_never_run_on_one_cpu(lab: Lab) -> None:
    """A taken CPU is refused after a wait with a message; a second lab runs beside on another."""
    lab.start()
    told: list[str] = []
    with pytest.raises(LabError, match="no CPU for a lab"):
        Lab(cpu=lab.cpu, patience=0.5, report=told.append).start()
    assert len(told) == 1
    assert "waiting for a CPU" in told[0]
    if len(os.sched_getaffinity(0)) == 1:
        return
    second = Lab(patience=0.5, memory="1G", report=told.append)
    try:
        with second:
            assert second.cpu not in (lab.cpu, None)
            assert second.run(["echo", "two"]).stdout == "two\n"
            assert lab.run(["echo", "one"]).stdout == "one\n"
    except LabError as error:
        # Then labs of other processes run beside this one, on all the CPUs there are.
        assert "no CPU for a lab" in str(error)  # noqa: PT017


def test_memory_kernel_arguments_and_modules_are_options(room: None) -> None:
    """The outer machine is as big, as configured and as equipped as it is asked to be."""
    with Lab(memory="1200M", append="numa=fake=2 hugepages=8", modules=["vhost_net"]) as lab:
        script = (
            "grep -E 'MemTotal|HugePages_Total' /proc/meminfo; ls -d /sys/devices/system/node/*"
        )
        shown = lab.run(["sh", "-c", f"{script}; ls /dev/vhost-net"]).stdout
    total = re.search(r"MemTotal:\s+(\d+)", shown)
    assert total is not None
    assert 1000 << 10 < int(total[1]) < 1200 << 10
    assert re.search(r"HugePages_Total:\s+8\n", shown)
    assert "node/node1\n" in shown
    assert "/dev/vhost-net\n" in shown


def test_a_lab_that_cannot_boot_gives_its_cpu_back(room: None) -> None:
    """Whoever keeps the object, for example in a traceback, keeps no CPU from other labs."""
    lab = Lab(append="rdinit=/no/such/init")
    with pytest.raises(LabError, match="does not start"), lab:
        pass
    assert lab.cpu is None


def test_a_lab_that_stands_still_is_started_again_and_its_job_run_again(
    room: None, tmp_path: Path
) -> None:
    """It is noticed by its silence, reported with its log, and forgiven only so often."""
    reports: list[str] = []
    tries = tmp_path / "tries"
    with Lab(shares=[tmp_path], silence=4, restarts=1, report=reports.append) as lab:

        def interrupt(number: int, after: int) -> None:
            wait_for(lambda: tries.exists() and tries.read_text().count("x") == after)
            os.kill(lab.pid, number)

        command = ["sh", "-c", f"cat; echo x >>{tries}; sleep 2; echo through"]
        freeze = threading.Thread(target=interrupt, args=(signal.SIGSTOP, 1))
        freeze.start()
        done = lab.run(command, input="kept\n")
        freeze.join()
        assert (done.stdout, done.returncode) == ("kept\nthrough\n", 0)
        assert tries.read_text() == "x\nx\n"
        assert len(lab.restarted) == 1
        assert [report for report in reports if "silent for" in report], reports
        assert "lab: job 1: sh -c cat" in reports[-1], "the last lines of the log are missing"

        kill = threading.Thread(target=interrupt, args=(signal.SIGKILL, 3))
        kill.start()
        with pytest.raises(LabError, match="died 2 times"):
            lab.run(command)
        kill.join()
    assert lab.pid == 0


def test_its_clock_is_right_however_busy_the_host_was_when_it_booted(room: None) -> None:
    """A kernel that measures its time-stamp counter itself is misled by what this test does."""
    lab = Lab()

    def disturb() -> None:
        wait_for(lambda: lab.pid != 0)
        emulator = lab.pid  # read once: 0, where there is none, would stop these tests themselves
        for _ in range(300):
            os.kill(emulator, signal.SIGSTOP)
            time.sleep(0.01)
            os.kill(emulator, signal.SIGCONT)
            time.sleep(0.005)

    def look() -> tuple[float, float, float]:
        """Its clock, and ours before and after."""
        before = time.monotonic()
        done = lab.run(["cat", "/proc/uptime"])
        return float(done.stdout.split()[0]), before, time.monotonic()

    disturber = threading.Thread(target=disturb)
    disturber.start()
    with lab:
        disturber.join()
        first, earliest, early = look()
        time.sleep(3)
        last, late, latest = look()
    passed = last - first + 0.01  # /proc/uptime counts hundredths
    assert 0.99 * (late - early) <= passed <= 1.01 * (latest - earliest) + 0.02


def command_line(*words: str | Path) -> list[str]:
    """The lab as a command."""
    return [sys.executable, str(HERE / "lab"), *map(str, words)]


def labs_emulator(parent: int) -> int:
    """The emulator that a process has started, 0 before it has."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    for child in map(int, children):
        if Path(f"/proc/{child}/comm").read_text().startswith("qemu-system"):
            return child
    return 0


def test_the_command_passes_streams_and_is_ended_by_sigterm_with_all_it_has_started(
    room: None, tmp_path: Path
) -> None:
    """Output comes at once; after SIGTERM neither emulator nor files are left."""
    script = f"cat {tmp_path}/file; cat; echo wrong >&2; sleep 1000"
    (tmp_path / "file").write_text("from a file\n")
    before = set(runtime_folder().glob("cpu-?"))
    with subprocess.Popen(
        command_line("--memory", "1G", "--", "sh", "-c", script),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(b"from a pipe\n")
        process.stdin.close()
        assert process.stdout.readline() == b"from a file\n"
        assert process.stdout.readline() == b"from a pipe\n"
        while process.stderr.readline() != b"wrong\n":
            assert process.poll() is None
        emulator = labs_emulator(process.pid)
        assert emulator
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM
    assert ended(emulator)
    assert set(runtime_folder().glob("cpu-?")) <= before


def test_the_emulator_dies_with_a_parent_that_is_killed(room: None) -> None:
    """Nothing goes on computing after SIGKILL of the one who asked for it."""
    process = subprocess.Popen(command_line("--", "sleep", "1000"), stdin=subprocess.DEVNULL)
    wait_for(lambda: labs_emulator(process.pid) != 0)
    emulator = labs_emulator(process.pid)
    process.kill()
    process.wait()
    wait_for(lambda: ended(emulator), 10)


class Typist:
    """Sits at a terminal at which the command of the lab runs."""

    def __init__(self, *words: str) -> None:
        self.seen = bytearray()
        self.near, far = pty.openpty()
        termios.tcsetwinsize(self.near, (30, 90))
        self.before = termios.tcgetattr(self.near)
        self.process = subprocess.Popen(
            command_line(*words), stdin=far, stdout=far, stderr=far, start_new_session=True
        )
        os.close(far)

    def __enter__(self) -> Typist:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.near)
        try:
            self.process.wait(30)
        finally:
            self.process.kill()
            self.process.wait()

    def types(self, keys: str) -> None:
        os.write(self.near, keys.encode())

    def sees(self, pattern: bytes, seconds: float = PATIENCE) -> None:
        """Wait until something appears on the screen."""
        started = time.monotonic()
        while (match := re.search(pattern, self.seen)) is None:
            assert time.monotonic() - started < seconds, bytes(self.seen)
            if select.select([self.near], [], [], 0.5)[0]:
                self.seen += os.read(self.near, 1 << 16)
        del self.seen[: match.end()]


def test_at_a_terminal_every_key_reaches_the_command_and_the_terminal_is_given_back(
    room: None,
) -> None:
    """The size passes, a key is echoed before the next is typed, control keys are the command's."""
    with Typist("--memory", "1G", "--", "env", "PS1=ready> ", "sh", "-i") as keyboard:
        keyboard.sees(rb"ready> ")
        keyboard.types("stty size\r")
        keyboard.sees(rb"30 90\r\nready> ")
        for key in "echo speed":
            keyboard.types(key)
            keyboard.sees(re.escape(key.encode()))
        keyboard.types("\rstty -echo -icanon -isig; echo go; od -An -tx1 -N4; stty sane\r")
        keyboard.sees(rb"go\r\n")
        keyboard.types("\x01x\x03\x04")
        keyboard.sees(rb"01 78 03 04")
        keyboard.types("exit 6\r")
        assert keyboard.process.wait(30) == 6
        assert termios.tcgetattr(keyboard.near) == keyboard.before


def test_the_lab_ends_with_the_terminal_it_is_used_at(room: None) -> None:
    """A window that is closed leaves no emulator behind."""
    with Typist("--memory", "1G", "--", "sh") as keyboard:
        wait_for(lambda: labs_emulator(keyboard.process.pid) != 0)
        emulator = labs_emulator(keyboard.process.pid)
        keyboard.sees(rb"[#$] ")
    assert keyboard.process.returncode == 128 + signal.SIGHUP
    assert ended(emulator)


def test_frames_survive_being_cut_anywhere() -> None:
    """The two sides understand each other however the port cuts what they say."""
    from lab import wire

    start = wire.Start(True, b"/x", [b"a", b""], [b"N=1"], [], [b"1:2:/w"])
    said = wire.frame(wire.START, 7, start.pack()) + wire.frame(wire.STDIN, 7)
    for cut in range(len(said) + 1):
        buffer = bytearray(said[:cut])
        heard = wire.frames(buffer)
        buffer += said[cut:]
        heard += wire.frames(buffer)
        assert [(kind, job) for kind, job, _ in heard] == [(wire.START, 7), (wire.STDIN, 7)]
        assert vars(wire.Start.unpack(heard[0][2])) == vars(start)
    with pytest.raises(ValueError, match="NUL"):
        wire.Start(False, b"/", [b"a\0b"], [], [], []).pack()


@pytest.mark.parametrize("terminal", [False, True])
def test_a_host_that_needs_no_lab_runs_commands_by_the_same_methods(terminal: bool) -> None:
    """`Direct` answers a dialogue as a lab does."""
    direct = Direct()
    done = direct.run(["sh", "-c", "cat; echo wrong >&2; kill -TERM $$"], input="x" * (1 << 20))
    assert (len(done.stdout), done.stderr, done.returncode) == (1 << 20, "wrong\n", 143)
    with direct.popen(["sh", "-c", "stty size; read x; echo $x; sleep 9"], pty=terminal) as job:
        job.resize(20, 70)
        job.write("word\n")
        job.read_until("word\r?\n")
        job.send_signal(signal.SIGTERM)
        assert job.wait() == 128 + signal.SIGTERM
