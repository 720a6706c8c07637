"""The code of all modules that `vmm run` imports, in one file: what a boot reads at its start.

Python looks for each module in one folder after another, compares its source with what was compiled
from it, then opens and reads that: for a hundred modules a third of the time that they take. This
file, which the first run leaves in the cache, is read at once.

It is no less careful. Each source has to be as it was, in size and time, and so have the folders of
`sys.path`, where another module of the same name could have come. If not, or with another Python,
the file counts for nothing: Python finds its modules by itself, and the file is written anew once
the guest has ended.
"""

from __future__ import annotations

import marshal
import os
import sys
from _frozen_importlib import ModuleSpec  # importlib.machinery would have to be found first
from _frozen_importlib_external import ExtensionFileLoader, SourceFileLoader

TYPE_CHECKING = False
if TYPE_CHECKING:
    from io import FileIO
    from types import CodeType
    from typing import Any

__all__ = ["Codes"]

# A module as it is in the file: its path, that of its compiled code, its folder if it is a package,
# and where among all code its own begins and how long it is; 0 of one in C.
_Module = tuple[str, "str | None", "str | None", int, int]
_SIZE = 8  # bytes at the beginning of the file: the length of what is told before all code


class Codes:
    """A finder of modules, for `sys.meta_path`.

    Attributes:
        path: of the file.
        modules: what is in it.
    """

    def __init__(self) -> None:
        base = os.environ.get("VMM_CACHE")
        if not base:
            base = f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/vmm-reference"
        base = os.path.expanduser(base)  # noqa: PTH111
        self.path = f"{base}/code/{sys.prefix.replace('/', '%')}.{sys.implementation.cache_tag}"
        self.modules: dict[str, _Module] = {}
        self._earlier = set(sys.modules)
        self._python = f"{sys.version} {sys.flags.optimize} {sys.path}"
        self._file: FileIO | None = None
        self._start = 0

    def use(self) -> None:
        """Let modules come from the file, if it can be trusted."""
        try:
            file = open(self.path, "rb", buffering=0)  # noqa: PTH123, SIM115
        except OSError:
            return
        if self._understand(file):
            self._file = file
            sys.meta_path.insert(0, self)
        else:
            file.close()

    def _understand(self, file: FileIO) -> bool:
        """Whether it is whole, of nobody else, and nothing has changed since it was written."""
        status = os.fstat(file.fileno())
        if status.st_uid != os.geteuid() or status.st_mode & 0o022:
            return False
        try:
            size = int.from_bytes(file.read(_SIZE), "little")
            python, stamps, modules, length = marshal.loads(file.read(size))
            self._start = _SIZE + size
            if status.st_size != self._start + length or python != self._python:
                return False
        except (OSError, EOFError, MemoryError, OverflowError, TypeError, ValueError):
            return False
        self.modules = modules if all(_stamp(path) == stamp for path, stamp in stamps) else {}
        return bool(self.modules)

    def find_spec(self, name: str, *_where: object) -> ModuleSpec | None:
        """How to load a module that is in the file; Python's own finders know the others."""
        found = self.modules.get(name)
        if found is None:
            return None
        path, cached, folder, _, length = found
        loader = _Loader(name, path, self) if length else ExtensionFileLoader(name, path)
        spec = ModuleSpec(name, loader, origin=path, is_package=folder is not None)
        spec.submodule_search_locations = None if folder is None else [folder]
        spec.has_location, spec.cached = True, cached
        return spec

    def code(self, name: str) -> bytes:
        """The code of a module that is in the file, as marshal writes it."""
        assert self._file is not None
        *_, start, length = self.modules[name]
        return os.pread(self._file.fileno(), length, self._start + start)

    def keep(self) -> None:
        """Write the file, unless it has all that was imported since this object was made."""
        sources: dict[str, Any] = {
            name: module.__spec__
            for name, module in list(sys.modules.items())
            if name not in self._earlier and _has_file(getattr(module, "__spec__", None))
        }
        if sys.dont_write_bytecode or self.modules.keys() >= sources.keys():
            return
        try:
            data = self._read(sources)
            os.makedirs(os.path.dirname(self.path), mode=0o700, exist_ok=True)  # noqa: PTH103, PTH120
            temporary = f"{self.path}.{os.getpid()}"
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(fd, "wb") as file:  # noqa: PTH123
                file.write(data)
                file.flush()
                os.fsync(fd)
            os.replace(temporary, self.path)  # noqa: PTH105
        except (OSError, ImportError, SyntaxError):
            pass  # no space, or sources that change at this moment: the next boot is slower

    def _read(self, sources: dict[str, Any]) -> bytes:
        """What is to be in the file, from the sources as they are now."""
        paths = [*sys.path, *(path for path, *_ in self.modules.values())]
        stamps = {path: _stamp(path) for path in paths}
        found = {name: (*rest[:3], self.code(name)) for name, rest in self.modules.items()}
        for name, spec in sources.items():
            path, folders, code = spec.origin, spec.submodule_search_locations, b""
            stamps[path] = _stamp(path)  # before the code is read: what changes later is noticed
            if isinstance(spec.loader, SourceFileLoader):
                code = marshal.dumps(SourceFileLoader(name, path).get_code(name))
            found[name] = path, spec.cached, folders[0] if folders else None, code
        modules, length = {}, 0
        for name, (*rest, code) in found.items():
            modules[name] = *rest, length, len(code)
            length += len(code)
        told = marshal.dumps((self._python, list(stamps.items()), modules, length))
        codes = [code for *_, code in found.values()]
        return b"".join([len(told).to_bytes(_SIZE, "little"), told, *codes])


class _Loader(SourceFileLoader):
    """Of a module in Python whose code is in the file."""

    def __init__(self, name: str, path: str, codes: Codes) -> None:
        super().__init__(name, path)
        self._codes = codes

    def get_code(self, name: str) -> CodeType | None:
        try:
            code: CodeType = marshal.loads(self._codes.code(name))
        except (OSError, EOFError, TypeError, ValueError):  # a host that crashed left it so
            return super().get_code(name)
        return code


def _has_file(spec: ModuleSpec | None) -> bool:
    return spec is not None and isinstance(spec.loader, (SourceFileLoader, ExtensionFileLoader))


def _stamp(path: str) -> tuple[int, int] | None:
    """What changes with a file, or with the names in a folder."""
    try:
        status = os.stat(path)  # noqa: PTH116
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns
