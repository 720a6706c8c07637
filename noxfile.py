"""Every task a contributor runs. `./dev SESSION`, or `nox -s SESSION` where nox is at hand.

One environment serves all sessions: `.nox/env`, with the five packages installed as a user would
have them (not editable, byte-compiled). It is made anew only when a pyproject or a C source
changes; a changed Python file costs a reinstall of its package, without a network.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import nox
import nox.project

nox.options.default_venv_backend = "none"
nox.options.sessions = ["tests"]

ROOT = Path(__file__).parent
PACKAGES = ("vm-memory", "kvm-ioctls", "virtio-queue", "linux-loader", "vmm-reference")
SIBLINGS = {
    "virtio-queue": ("vm-memory",),
    "linux-loader": ("vm-memory",),
    "vmm-reference": PACKAGES[:-1],
}
GROUPS = nox.project.load_toml(ROOT / "pyproject.toml")["dependency-groups"]
ENV = ROOT / ".nox" / "env"
PYTHON = str(ENV / "bin" / "python")
VMM = str(ENV / "bin" / "vmm")

# What a session may need from the system: how to see whether it is there, and Debian's package.
SYSTEM = {
    "gcc": "gcc libc6-dev", "as": "binutils", "qemu-system-x86_64": "qemu-system-x86",
    "iasl": "acpica-tools", "dtc": "device-tree-compiler", "mkfs.ext4": "e2fsprogs",
    "cpio": "cpio", "depmod": "kmod", "ip": "iproute2", "passt": "passt", "fio": "fio",
    "iperf3": "iperf3",
    "aarch64-linux-gnu-gcc": "gcc-aarch64-linux-gnu libc6-dev-arm64-cross",
    "riscv64-linux-gnu-gcc": "gcc-riscv64-linux-gnu libc6-dev-riscv64-cross",
}  # fmt: skip


def system(session: nox.Session, *commands: str) -> None:
    """Install the Debian packages behind the commands that are missing, saying what and why."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    missing = {name: SYSTEM[name] for name in commands if shutil.which(name, path=path) is None}
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        missing["Python.h"] = "python3-dev"
    if not missing:
        return
    packages = sorted({package for names in missing.values() for package in names.split()})
    session.log(f"not on this system: {', '.join(missing)}; they come with {', '.join(packages)}")
    install = ["apt-get", "install", "-y", "-q", "--no-install-recommends", *packages]
    root = [] if os.geteuid() == 0 else ["sudo"]
    if shutil.which("apt-get") is None or (root and shutil.which("sudo") is None):
        session.error(f"install them, as root: {shlex.join(install)}")
    session.run(*root, "apt-get", "update", "-q", external=True, silent=True)
    session.run(
        *root, "env", "DEBIAN_FRONTEND=noninteractive", *install, external=True, silent=True
    )


def digest(paths: list[Path]) -> str:
    """A hash over the names and contents of files."""
    state = hashlib.sha256(sys.version.encode())
    for path in sorted(path for path in paths if path.is_file()):
        state.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return state.hexdigest()


def pip(session: nox.Session, *arguments: str, python: str = PYTHON) -> None:
    """Install into an environment by the pip that nox itself was installed with."""
    session.run(
        sys.executable, "-m", "pip", "--python", python, "install", "--quiet",
        "--no-warn-script-location", *arguments, external=True,
    )  # fmt: skip


def environment(session: nox.Session) -> None:
    """Make or refresh `.nox/env`, doing only what has changed since the last time."""
    system(session, "gcc", "as")
    folders = {name: ROOT / "packages" / name for name in PACKAGES}
    fixed = [file for name in ("pyproject.toml", "CMakeLists.txt", "native/*")
             for folder in (ROOT, *folders.values()) for file in folder.glob(name)]  # fmt: skip
    marks = {name: digest([*f.glob("s*/**/*")]) for name, f in folders.items()}  # src and scripts
    marks[""] = digest(fixed)
    known = {name: ENV / f"installed-{name or 'all'}" for name in marks}
    stale = [n for n, f in known.items() if not f.exists() or f.read_text() != marks[n]]
    if "" in stale:
        session.log("making the environment (minutes the first time, then only after changes)")
        shutil.rmtree(ENV, ignore_errors=True)  # without pip and its like a guest boots sooner
        session.run(sys.executable, "-m", "venv", "--without-pip", str(ENV), external=True)
        pip(session, *(item for name in ("build", "test", "lint", "docs") for item in GROUPS[name]))
        pip(session, "--no-build-isolation", *map(str, folders.values()))
        stale = list(marks)
    elif stale:
        session.log(f"installing what has changed: {', '.join(stale)}")
        pip(session, "--no-build-isolation", "--no-deps", "--no-index", "--force-reinstall",
            *(str(folders[name]) for name in stale))  # fmt: skip
    for name in stale:
        known[name].write_text(marks[name])


def in_lab(session: nox.Session, *command: str) -> None:
    """Run a command in the lab, with the host's files as it sees them."""
    system(session, "qemu-system-x86_64")
    session.run(PYTHON, "tests/lab", "--", *command, external=True)


@nox.session
def boot(session: nox.Session) -> None:
    """Boot Debian's own kernel: to a shell on a terminal, through a self-check otherwise."""
    environment(session)
    system(session, "mkfs.ext4")
    arguments = ["boot", *session.posargs]
    # A probe guest tells whether this machine's KVM can run an unmodified kernel.
    answer = subprocess.run([VMM, "doctor", "--probe"], check=False, capture_output=True, text=True)
    session.log(answer.stdout.strip() or answer.stderr.strip())
    if answer.returncode == 0:
        session.run(VMM, *arguments, external=True)
    else:
        session.run(VMM, *arguments, "--prepare", external=True)
        in_lab(session, VMM, *arguments)


@nox.session
def lab(session: nox.Session) -> None:
    """Run any command in the lab: `nox -s lab -- COMMAND...`."""
    environment(session)
    in_lab(session, *(session.posargs or ["/bin/bash"]))


@nox.session
def lint(session: nox.Session) -> None:
    """Style and types: ruff over everything, mypy strict once a package and once for the rest."""
    environment(session)
    session.run(PYTHON, "-m", "ruff", "check", ".", external=True)
    session.run(PYTHON, "-m", "ruff", "format", "--check", ".", external=True)
    for folder in (f"packages/{name}/{part}" for name in PACKAGES for part in ("src", "tests")):
        session.run(PYTHON, "-m", "mypy", folder, external=True)
    session.run(PYTHON, "-m", "mypy", "tests", "benchmarks", "noxfile.py", external=True)


@nox.session
def alone(session: nox.Session) -> None:
    """Each package in an empty environment, its tests in an empty folder: `-- PACKAGE...`."""
    environment(session)
    system(session, "as", "iasl", "dtc", "mkfs.ext4", "cpio", "depmod", "qemu-system-x86_64")
    with tempfile.TemporaryDirectory(prefix="alone-") as scratch:
        Path(scratch).chmod(0o755)  # a test becomes another user, who needs the interpreter too
        wheels = Path(scratch, "wheels")
        session.run(
            sys.executable, "-m", "pip", "--python", PYTHON, "wheel", "--quiet", "--no-deps",
            "--no-build-isolation", "--no-index", "--wheel-dir", str(wheels),
            *(str(ROOT / "packages" / name) for name in PACKAGES), external=True,
        )  # fmt: skip
        for name in session.posargs or PACKAGES:
            # Siblings are named by their files, so that no registry is asked for them.
            files = [next(wheels.glob(f"{item.replace('-', '_')}-*.whl"))
                     for item in (name, *SIBLINGS.get(name, ()))]  # fmt: skip
            python = Path(scratch, name, "env", "bin", "python")
            session.run(sys.executable, "-m", "venv", "--without-pip", str(python.parents[1]),
                        external=True)  # fmt: skip
            pip(session, f"{files[0]}[testing]", *map(str, files[1:]), python=str(python))
            folder = Path(scratch, name)
            shutil.copytree(ROOT / "packages" / name / "tests", folder / "tests")
            with session.chdir(folder):
                session.run(str(python), "-m", "pytest", "-q", "-W", "error", "--strict-markers",
                            "--import-mode=importlib", "-ra", "tests", external=True)  # fmt: skip


@nox.session
def doctest(session: nox.Session) -> None:
    """The examples in the docstrings of every package."""
    environment(session)
    for name in PACKAGES:
        session.run(PYTHON, "-m", "pytest", "-q", "--doctest-modules", "--pyargs",
                    name.replace("-", "_"), external=True)  # fmt: skip


@nox.session
def whole(session: nox.Session) -> None:
    """What only the whole can show: boots, the lab, the two commands: `-- PYTEST ARGUMENTS`."""
    environment(session)
    system(session, "qemu-system-x86_64", "iasl", "mkfs.ext4", "fio",
           "aarch64-linux-gnu-gcc", "riscv64-linux-gnu-gcc")  # fmt: skip
    if subprocess.run([PYTHON, "-c", "import ziglang"], capture_output=True).returncode:
        pip(session, *GROUPS["headers"])
    workers = str(min(len(os.sched_getaffinity(0)), 4))  # one lab each, on a core of its own
    session.run(PYTHON, "-m", "pytest", "-n", workers, "--dist", "worksteal",
                *(session.posargs or ["tests", "benchmarks"]), external=True)  # fmt: skip


@nox.session
def coverage(session: nox.Session) -> None:
    """Branches of Python and lines of C against the floors in the pyprojects: `-- PACKAGE...`."""
    environment(session)
    session.run(sys.executable, "tests/floors.py", PYTHON, *session.posargs, external=True)


@nox.session
def asan(session: nox.Session) -> None:
    """The tests of the packages with C, compiled with AddressSanitizer: `-- PACKAGE...`."""
    environment(session)
    session.run(sys.executable, "tests/asan.py", PYTHON, *session.posargs, external=True)


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation of all packages as one site, every reference resolved."""
    environment(session)
    session.run(PYTHON, "-m", "sphinx", "-nWq", "-b", "html", "docs", "docs/_build", external=True)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure against the floor and a peer: `-- SUITE [--json FILE] [--peer NAME=PATH]`."""
    environment(session)
    system(session, "gcc", "qemu-system-x86_64", "mkfs.ext4", "cpio", "fio", "iperf3", "ip")
    session.run(PYTHON, "-m", "benchmarks", *session.posargs, external=True)


@nox.session
def fuzz(session: nox.Session) -> None:
    """Property tests with fresh randomness for some minutes: `-- MINUTES [PACKAGE...]`."""
    environment(session)
    minutes, *chosen = session.posargs or ["5"]
    deadline = time.monotonic() + 60 * float(minutes)
    while time.monotonic() < deadline:
        for name in chosen or PACKAGES:
            session.run(PYTHON, "-m", "pytest", "-q", "-x", "-m", "not linux",
                        "--hypothesis-profile=fuzz", "--hypothesis-seed=random",
                        f"packages/{name}/tests", external=True)  # fmt: skip


@nox.session
def tests(session: nox.Session) -> None:
    """All that must pass: style, types, each package alone, doctests, the docs, the whole."""
    system(session, *SYSTEM)
    for part in ("lint", "alone", "doctest", "coverage", "docs", "whole"):
        session.notify(part)
