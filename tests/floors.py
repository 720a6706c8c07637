"""Coverage of packages against the floors in their pyprojects: `PYTHON [PACKAGE...]`.

Branches of the Python are measured by coverage.py against `tool.coverage.report.fail_under`; lines
of the C, compiled for the purpose, by gcov against `tool.PACKAGE.c-line-coverage`. Both are
printed, and the exit status says whether a floor was missed. Without names, all packages that have
a floor are measured. Run by an interpreter that has pip; PYTHON is that of the environment with all
packages and their tools.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

PACKAGES = Path(__file__).parents[1] / "packages"


def install(
    python: str, package: Path, scratch: Path, flags: str = "--coverage -O0"
) -> dict[str, str]:
    """Build a package with other C flags, and return an environment that finds it first."""
    build = [
        f"--config-settings=cmake.define.CMAKE_C_FLAGS={flags}",
        f"--config-settings=build-dir={scratch / 'build'}",
    ]
    native = build if (package / "native").is_dir() else []
    subprocess.run(
        [
            sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps",
            "--no-index", "--no-build-isolation", "--target", scratch / "site", *native, package,
        ],
        check=True,
    )  # fmt: skip
    return {
        **os.environ,
        "PYTHONPATH": str(scratch / "site"),
        "COVERAGE_FILE": str(scratch / "coverage"),
    }


def branches(python: str, package: Path, environment: dict[str, str]) -> bool:
    """Run the package's tests; whether they pass and cover enough of the Python."""
    coverage = [python, "-m", "coverage"]
    rules = f"--rcfile={package / 'pyproject.toml'}"
    tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", str(package / "tests")]
    ran = subprocess.run([*coverage, "run", rules, *tests], env=environment, check=False)
    told = subprocess.run(
        [*coverage, "report", rules, "--skip-covered", "--show-missing"],
        env=environment,
        check=False,
    )
    return ran.returncode == told.returncode == 0


def lines(package: Path, scratch: Path, floor: float) -> bool:
    """Whether the tests that ran covered enough of the package's own C."""
    data = [str(file) for file in (scratch / "build").rglob("*.gcda")]
    report = subprocess.run(
        ["gcov", "-n", "-r", "-s", package, *data],
        cwd=scratch, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    files = re.findall(r"File '(native/.+)'\nLines executed:([\d.]+)% of (\d+)", report)
    covered = total = 0.0
    for name, share, count in sorted(files):
        print(f"{name:<40}{float(share):7.1f}% of {count} lines")
        covered += float(share) * int(count)
        total += int(count)
    share = covered / total if total else 0.0
    print(f"C of {package.name}: {share:.2f}% of {total:.0f} lines; the floor is {floor:g}%")
    return share >= floor


def main() -> int:
    """See the module."""
    python, *names = sys.argv[1:]
    missed = []
    for package in sorted(file.parent for file in PACKAGES.glob("*/pyproject.toml")):
        name = package.name
        tables = tomllib.loads((package / "pyproject.toml").read_text()).get("tool", {})
        if name not in names and (names or "coverage" not in tables):
            continue
        with tempfile.TemporaryDirectory(prefix="coverage-") as folder:
            scratch = Path(folder)
            environment = install(python, package, scratch)
            good = branches(python, package, environment)
            floor = tables.get(name, {}).get("c-line-coverage")
            if floor is not None:
                good = lines(package, scratch, floor) and good
        if not good:
            missed.append(name)
    if missed:
        print(f"below its floor, or failing: {', '.join(missed)}")
    return len(missed)


if __name__ == "__main__":
    sys.exit(main())
