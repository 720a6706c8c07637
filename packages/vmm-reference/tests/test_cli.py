"""The command line: a user's mistake is one line and status 2, never a traceback."""

import struct
import subprocess
import sys
from pathlib import Path

import pytest

from kvm_ioctls import Kvm
from vmm_reference.cli import main
from vmm_reference.cli.options import parser
from vmm_reference.cli.run import configuration, options
from vmm_reference.cpu.state import CpuPolicy
from vmm_reference.errors import ConfigError
from vmm_reference.testing import tiny_kernel


def vmm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vmm_reference", *arguments],
        capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.fixture
def kernel(tmp_path: Path) -> str:
    path = tmp_path / "kernel"
    path.write_bytes(tiny_kernel("PUT 'o'; PUT 'k'; POWER_OFF"))
    return str(path)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["--kernel", "/no/such/kernel"], "kernel"),
        (["--kernel", "/"], "kernel"),
        (["--kernel", "/etc/passwd"], "kernel"),
        ([], "kernel"),
        (["--memory", "1"], "memory"),
        (["--memory", "many"], "memory"),
        (["--cpus", "10000"], "cpus"),
        (["--cpus", "0"], "cpus"),
        (["--cpus", "two"], "cpus"),
        (["--cpus", "-1"], "cpus"),
        (["--drive", "/no/such/disk"], "drives[0]"),
        (["--initrd", "/"], "initrd"),
        (["--initrd", "/dev/null"], "initrd"),
        (["--cmdline", "a\nb"], "cmdline"),
        (["--on-reset", "explode"], "on_reset"),
        (["--protocol", "efi"], "protocol"),
        (["--config", "/no/such/file"], "config"),
        (["--config", "/"], "config"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    arguments: list[str], field: str, kernel: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line names the field, the value and the rule."""
    if "--kernel" not in arguments and arguments:
        arguments = ["--kernel", kernel, *arguments]
    assert main(["run", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"vmm: {field}: ")
    assert captured.err.count("\n") == 1


@pytest.mark.kvm
@pytest.mark.parametrize(
    ("image", "options", "field"),
    [
        (b"\x7fELF garbage", [], "kernel"),
        (bytes(0x202) + b"HdrS" + bytes(500), [], "kernel"),
        (None, ["--cmdline", "a" * 100_000], "cmdline"),
        (None, ["--cpus", "1", "--protocol", "pvh", "--kaslr"], "kernel"),
        ("big", [], "memory"),
    ],
    ids=["broken-elf", "broken-bzimage", "long-cmdline", "protocol", "too-big"],
)
def test_what_the_loader_refuses_is_a_mistake_too(
    image: bytes | str | None, options: list[str], field: str, kernel: str, tmp_path: Path
) -> None:
    """One line that names the field, and status 2, though the machine was half built."""
    path = tmp_path / "image"
    if image == "big":  # its one segment takes more than the machine's memory
        content = bytearray(Path(kernel).read_bytes())
        header = struct.unpack_from("<Q", content, 32)[0]
        assert struct.unpack_from("<I", content, header)[0] == 1  # PT_LOAD
        struct.pack_into("<Q", content, header + 40, 1 << 30)
        path.write_bytes(content)
    else:
        path.write_bytes(image if isinstance(image, bytes) else Path(kernel).read_bytes())
    done = vmm("run", "--kernel", str(path), *options)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"vmm: {field}: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_an_option_not_given_leaves_the_file_its_say(kernel: str, tmp_path: Path) -> None:
    """Only what stands on the command line wins over the file, even where it says no or 0."""
    config = tmp_path / "machine.toml"
    config.write_text(f'kernel = "{kernel}"\nkaslr = true\ncpus = 3\n')
    made = configuration(str(config), {"kaslr": None, "cpus": None, "drives": None})
    assert (made.kaslr, made.cpus) == (True, 3)
    with pytest.raises(ConfigError, match="cpus: 0"):
        configuration(str(config), {"cpus": 0})


def test_an_unknown_option_is_refused_with_usage(capsys: pytest.CaptureFixture[str]) -> None:
    """So is an unknown verb; both with status 2."""
    assert main(["run", "--no-such-option"]) == 2
    assert "--no-such-option" in capsys.readouterr().err
    assert main(["explode"]) == 2
    assert "explode" in capsys.readouterr().err


def test_unknown_keys_of_a_file_are_refused(
    kernel: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A misspelt key would otherwise be a machine that nobody asked for."""
    config = tmp_path / "machine.toml"
    for text, word in (
        (f'kernel = "{kernel}"\nmemry = "1G"\n', "memry"),
        ("kernel = ", "is not TOML"),
        (f'kernel = "{kernel}"\ndrives = [{{path = "x", ro = true}}]\n', "ro"),
    ):
        config.write_text(text)
        assert main(["run", "--config", str(config)]) == 2
        error = capsys.readouterr().err
        assert word in error
        assert error.count("\n") == 1


@pytest.mark.kvm
def test_options_win_over_the_file(kernel: str, tmp_path: Path) -> None:
    """A file gives the machine, options change it; the guest's output is standard output."""
    config = tmp_path / "machine.toml"
    config.write_text('kernel = "/no/such/kernel"\nmemory = "64M"\ncpus = 2\n')
    done = vmm("run", "--config", str(config), "--kernel", kernel)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok", "")


@pytest.mark.kvm
def test_what_kvm_cannot_emulate_is_status_6(tmp_path: Path) -> None:
    """Code where there is no memory: no KVM can run it, and its reason is told in one line."""
    path = tmp_path / "kernel"
    path.write_bytes(tiny_kernel("PUT 'a'; movl $0xD0000000, %eax; jmp *%eax"))
    done = vmm("run", "--kernel", str(path))
    assert (done.returncode, done.stdout) == (6, "a")
    assert done.stderr.startswith("vmm: KVM internal error: vCPU 0: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.kvm
def test_memory_that_this_host_cannot_have(kernel: str) -> None:
    """Beyond the guest-physical addresses, or refused by the host's kernel: one line, status 2."""
    with Kvm() as kvm:
        bits = CpuPolicy(kvm, 1).physical_address_bits
    if bits <= 40:
        done = vmm("run", "--kernel", kernel, "--memory", "1T")
        assert done.returncode == 2
        assert f"{bits} bits of guest-physical addresses" in done.stderr
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30));"
        "from vmm_reference.cli import main; sys.exit(main(['run', *sys.argv[1:]]))"
    )
    done = subprocess.run([sys.executable, "-c", code, "--kernel", kernel, "--memory", "2G"],
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "vmm: memory: 2048M: can't be had on this host: Cannot allocate memory\n"


def test_an_initrd_of_no_bytes_is_refused(kernel: str, tmp_path: Path) -> None:
    """A kernel would boot without it, and without a word."""
    empty = tmp_path / "initrd"
    empty.touch()
    done = vmm("run", "--kernel", kernel, "--initrd", str(empty))
    assert (done.returncode, done.stderr) == (2, f"vmm: initrd: {empty}: is empty\n")


def test_help_and_version_name_the_verbs() -> None:
    """`vmm --help` lists every verb, `vmm run --help` every exit status."""
    listed = vmm("--help")
    assert listed.returncode == 0
    for verb in ("boot", "doctor", "image", "run"):
        assert verb in listed.stdout
    run = vmm("run", "--help")
    assert run.returncode == 0
    assert "128 + N" in run.stdout
    assert "0.1.0" in vmm("--version").stdout


OURS = ("kvm_ioctls", "linux_loader", "virtio_queue", "vm_memory", "vmm_reference")
OURS = ("kvm_ioctls", "linux_loader", "virtio_queue", "vm_memory", "vmm_reference")
A_RUN = """
import sys
before = set(sys.modules)
from vmm_reference.cli import main
import vmm_reference.vcpu

def run(thread):
    print(*sorted(set(sys.modules) - before))
    loop(thread)

loop = vmm_reference.vcpu.VcpuThread._loop
vmm_reference.vcpu.VcpuThread._loop = run
status = main(["run", "--kernel", *sys.argv[1:]])
print()
print(*sorted(set(sys.modules) - before))
sys.exit(status)
"""


@pytest.mark.kvm
@pytest.mark.parametrize("disk", [False, True])
def test_the_way_to_a_guest_imports_little(disk: bool, kernel: str, tmp_path: Path) -> None:
    """What is imported until the first KVM_RUN decides when a guest starts, and later when it ends.

    In an emulated machine each module costs it some 3 ms, a class that attrs makes as much, and
    attrs with what it needs half a second.
    """
    arguments = [kernel, "--cmdline=console=ttyS0"]
    if disk:
        image = tmp_path / "disk"
        image.write_bytes(bytes(1 << 20))
        arguments += ["--drive", str(image), "--initrd", "none"]
    done = subprocess.run([sys.executable, "-c", A_RUN, *arguments],
                          capture_output=True, text=True, check=True)  # fmt: skip
    first, _, last = done.stdout.partition("ok")
    found = set(first.split())
    heavy = {"argparse", "asyncio", "attr", "attrs", "cffi", "click", "ctypes", "inspect", "json",
             "logging", "lz4", "pathlib", "re", "subprocess", "tempfile", "tomllib", "typing",
             "zstandard"}  # fmt: skip
    assert not heavy & found
    assert not heavy & set(last.split())
    rooms = {"vmm_reference.image", "vmm_reference.state", "vmm_reference.pci",
             "vmm_reference.firmware", "vmm_reference.backends.console"}  # fmt: skip
    assert not rooms & found
    ours = [name for name in found if name.startswith(OURS)]
    assert len(ours) <= (130 if disk else 122)


@pytest.mark.parametrize(
    "words",
    [
        ["--kernel", "K", "--cpus=2", "--drive", "a", "--drive", "b,ro", "--kaslr"],
        ["--memory=1G", "--cmdline=a=b c=d", "--device", "rng", "--config", "F"],
        ["--kernel", "a", "--kernel", "b", "--initrd", "none", "--on-reset", "exit"],
        [],
    ],
)
def test_the_short_way_through_the_options_is_argparse_s(words: list[str]) -> None:
    """Options in their plain form give what argparse, which nobody waits for then, would give."""
    assert options(words) == vars(parser().parse_args(words))


def test_both_ways_know_the_same_options() -> None:
    """Each option of the long way is one of the short way."""
    plain = parser().parse_args([])
    assert options([]) == vars(plain)
    for action in parser()._actions:
        if action.dest != "help":
            word = action.option_strings[0]
            given = [word] if action.nargs == 0 else [word, "1"]
            assert options(given) == vars(parser().parse_args(given))


@pytest.mark.kvm
def test_the_doctor_reports_on_this_host() -> None:
    """It names /dev/kvm, capabilities and whether unmodified kernels run, and exits 0."""
    done = vmm("doctor")
    assert done.returncode == 0
    for topic in ("/dev/kvm", "KVM_CAP_IRQFD", "unmodified kernels", "memory"):
        assert topic in done.stdout
    assert vmm("doctor", "--probe").returncode in (0, 3)
