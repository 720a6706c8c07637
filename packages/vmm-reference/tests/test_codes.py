"""The file with the code of a boot's modules: used where nothing has changed, and only there."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest

PROGRAM = """
import sys
from vmm_reference.cli.codes import Codes

codes = Codes()
codes.use()
import house.room
from house import table
print(house.room.VALUE, type(house.room.__spec__.loader).__name__, house.room.__file__,
      house.__path__[0], house.room.who.__code__.co_filename)
import inspect
assert "VALUE" in inspect.getsource(house.room)
codes.keep()
"""


@attrs.frozen
class House:
    """A package with a module, and processes that import it."""

    root: Path

    @property
    def room(self) -> Path:
        """The module's source."""
        return self.root / "later" / "house" / "room.py"

    @property
    def file(self) -> Path:
        """What `Codes` has written."""
        (found,) = (self.root / "cache" / "code").iterdir()
        return found

    def enter(self, *flags: str, **environment: str) -> tuple[str, str]:
        """The module's value in a fresh process, and what kind of loader it came by."""
        path = os.pathsep.join([str(self.root / "sooner"), str(self.root / "later")])
        found = {"PATH": os.defpath, "VMM_CACHE": str(self.root / "cache"), "PYTHONPATH": path}
        command = [sys.executable, *flags, "-c", PROGRAM]
        done = subprocess.run(command, env=found | environment, check=True, timeout=60,
                              capture_output=True, text=True, cwd="/")  # fmt: skip
        value, loader, file, folder, code = done.stdout.split()
        assert (Path(file).name, file, str(Path(file).parent)) == ("room.py", code, folder)
        return value, loader


PYTHON, OURS = "SourceFileLoader", "_Loader"


@pytest.fixture
def house(tmp_path: Path) -> House:
    """Nobody has been there yet."""
    made = House(tmp_path)
    made.room.parent.mkdir(parents=True)
    (tmp_path / "sooner").mkdir()
    (made.room.parent / "__init__.py").touch()
    (made.room.parent / "table.py").touch()
    made.room.write_text("VALUE = 'old'\ndef who(): pass\n")
    return made


def test_the_second_process_has_it_from_the_file(house: House) -> None:
    """And leaves the file alone, since there was nothing to add."""
    assert house.enter() == ("old", PYTHON)
    before = house.file.stat()
    assert house.enter() == ("old", OURS)
    assert house.file.stat().st_ino == before.st_ino
    assert before.st_mode & 0o777 == 0o600


def test_what_a_process_imports_in_addition_is_added(house: House) -> None:
    """And what it did not need stays."""
    house.enter()
    (house.room.parent / "table.py").write_text("import house.chair\n")
    (house.room.parent / "chair.py").touch()
    assert house.enter() == ("old", PYTHON)
    before = house.file.stat()
    assert house.enter() == ("old", OURS)
    assert house.file.stat().st_ino == before.st_ino


def rewrite(house: House) -> None:
    """As many bytes, in the same file, seconds later."""
    status = house.room.stat()
    house.room.write_text(house.room.read_text().replace("old", "new"))
    os.utime(house.room, ns=(status.st_atime_ns, status.st_mtime_ns + 2 * 10**9))


def rewrite_in_a_moment(house: House) -> None:
    """Within the same second, which Python's own check does not see."""
    status = house.room.stat()
    house.room.write_text(house.room.read_text().replace("old", "new"))
    os.utime(house.room, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    for compiled in (house.room.parent / "__pycache__").iterdir():
        compiled.unlink()


def shadow(house: House) -> None:
    """A package of the same name, where Python looks sooner."""
    folder = house.root / "sooner" / "house"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "table.py").touch()
    (folder / "room.py").write_text("VALUE = 'new'\ndef who(): pass\n")


@pytest.mark.parametrize("change", [rewrite, rewrite_in_a_moment, shadow])
def test_a_change_is_seen_at_once(change: Callable[[House], None], house: House) -> None:
    """Of a source, or of where it would be found. The next process has the new one kept."""
    house.enter()
    change(house)
    assert house.enter() == ("new", PYTHON)
    assert house.enter() == ("new", OURS)


def test_another_file_that_is_gone_counts_too(house: House) -> None:
    """It may be what decided that a module is there."""
    house.enter()
    (house.room.parent / "table.py").unlink()
    with pytest.raises(subprocess.CalledProcessError):
        house.enter()


@pytest.mark.parametrize("left", [0, 1, 8, 100, -5000, -1])
def test_a_file_that_was_cut_is_written_anew(left: int, house: House) -> None:
    """As by a host that crashed."""
    house.enter()
    house.file.write_bytes(house.file.read_bytes()[:left])
    assert house.enter() == ("old", PYTHON)
    assert house.enter() == ("old", OURS)


def test_noise_is_no_file(house: House) -> None:
    """Of any length that it may claim."""
    house.enter()
    house.file.write_bytes(b"\xff" * 10000)
    assert house.enter() == ("old", PYTHON)
    assert house.enter() == ("old", OURS)


def test_code_that_was_lost_comes_from_its_source(house: House) -> None:
    """Pages of zeros, which some file systems leave after a crash."""
    house.enter()
    whole = house.file.read_bytes()
    told = 8 + int.from_bytes(whole[:8], "little")
    house.file.write_bytes(whole[:told] + bytes(len(whole) - told))
    assert house.enter() == ("old", OURS)


def test_a_file_that_others_may_write_is_not_used(house: House) -> None:
    """Who writes it decides what this process does."""
    house.enter()
    house.file.chmod(0o620)
    assert house.enter() == ("old", PYTHON)


def test_other_optimization_or_path_is_another_python(house: House) -> None:
    """Asserts are in the code of one and not of the other."""
    house.enter()
    assert house.enter("-O") == ("old", PYTHON)
    assert house.enter("-O") == ("old", OURS)
    assert house.enter(PYTHONPATH=str(house.root / "later")) == ("old", PYTHON)


def test_nothing_is_kept_where_nothing_can_be(house: House) -> None:
    """A cache that is no folder, and a process that is to write no compiled code."""
    (house.root / "cache").touch()
    assert house.enter() == ("old", PYTHON)
    (house.root / "cache").unlink()
    assert house.enter("-B") == ("old", PYTHON)
    assert not (house.root / "cache").exists()


def test_the_command_uses_it(tmp_path: Path) -> None:
    """A mistake is told in the same words by the first run and the second."""
    command = [str(Path(sys.executable).with_name("vmm")), "run", "--kernel", "/no/kernel"]
    environment = {"PATH": os.defpath, "VMM_CACHE": str(tmp_path), "PYTHONPROFILEIMPORTTIME": "1"}
    seen = []
    for _ in range(2):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2
        seen.append([line for line in done.stderr.splitlines() if "import time" not in line])
        inodes = {path.stat().st_ino for path in (tmp_path / "code").iterdir()}
        assert len(inodes) == 1
        seen.append([str(inode) for inode in inodes])
    assert seen[0] == seen[2] == ["vmm: kernel: /no/kernel: No such file or directory"]
    assert seen[1] == seen[3]
