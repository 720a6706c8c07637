"""The tests of packages with C, compiled with AddressSanitizer: `PYTHON [PACKAGE...]`.

A test that makes the C touch a byte that is not its own ends with a report of the sanitizer, and
the run fails. Without names, all packages that have C are tested. Run by an interpreter that has
pip; PYTHON is that of the environment with all packages and their tools.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from floors import PACKAGES, install

FLAGS = "-fsanitize=address -fno-omit-frame-pointer -g"

# The interpreter itself is not instrumented, so the run-time library is loaded before it; what it
# keeps until its end is no leak of ours. Faults are answered by vm-memory's own handler, which is
# under test.
OPTIONS = ":".join(
    ("detect_leaks=0", "handle_sigbus=0", "handle_segv=0", "allocator_may_return_null=1")
)


def passes(python: str, package: Path) -> bool:
    """Whether the package's tests pass with its C watched."""
    library = subprocess.run(
        ["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    with tempfile.TemporaryDirectory(prefix="asan-") as folder:
        scratch = Path(folder)
        scratch.chmod(0o755)  # a test becomes another user, who needs the package too
        environment = install(python, package, scratch, FLAGS)
        environment |= {"LD_PRELOAD": library, "ASAN_OPTIONS": OPTIONS}
        module = package.name.replace("-", "_")
        watched = (
            f"import {module}._native as native; from pathlib import Path; "
            f"assert native.__file__.startswith({folder!r}), native.__file__; "
            f"assert b'__asan_report' in Path(native.__file__).read_bytes(), 'not instrumented'"
        )
        subprocess.run([python, "-c", watched], env=environment, check=True)
        tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", str(package / "tests")]
        return subprocess.run([python, *tests], env=environment, check=False).returncode == 0


def main() -> int:
    """See the module."""
    python, *names = sys.argv[1:]
    packages = sorted(folder.parent for folder in PACKAGES.glob("*/native"))
    chosen = [package for package in packages if not names or package.name in names]
    failed = [package.name for package in chosen if not passes(python, package)]
    if failed:
        print(f"not clean under AddressSanitizer: {', '.join(failed)}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
