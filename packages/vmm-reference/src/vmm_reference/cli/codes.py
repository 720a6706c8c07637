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
    from types import CodeType
    from typing import Any

__all__ = ["Codes"]

# A module as it is in the file: its path, that of its compiled code, its folder if it is a package,
# and its code unless it is in C.
_Module = tuple[str, "str | None", "str | None", "bytes | None"]


class Codes:
    """A finder of modules, for `sys.meta_path`.

    Attributes:
        path: of the file.
        modules: those in the file that nobody has asked for yet.
    """

    def __init__(self) -> None:
        base = os.environ.get("VMM_CACHE")
        if not base:
            base = f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/vmm-reference"
        base = os.path.expanduser(base)  # noqa: PTH111
        self.path = f"{base}/code/{sys.prefix.replace('/', '%')}.{sys.implementation.cache_tag}"
        self.modules: dict[str, _Module] = {}
        self._known: set[str] = set()
        self._earlier = set(sys.modules)
        self._python = f"{sys.version} {sys.flags.optimize} {sys.path}"

    def use(self) -> None:
        """Let modules come from the file, if it can be trusted."""
        try:
            with open(self.path, "rb") as file:  # noqa: PTH123
                status = os.fstat(file.fileno())
                if status.st_uid != os.geteuid() or status.st_mode & 0o022:
                    return  # somebody else may have written it
                python, stamps, modules = marshal.loads(file.read())
        except (OSError, EOFError, TypeError, ValueError):
            return
        if python == self._python and all(_stamp(path) == stamp for path, stamp in stamps):
            self.modules, self._known = modules, set(modules)
            sys.meta_path.insert(0, self)

    def find_spec(self, name: str, *_where: object) -> ModuleSpec | None:
        """How to load a module that is in the file; Python's own finders know the others."""
        found = self.modules.get(name)
        if found is None:
            return None
        path, cached, folder, code = found
        loader = ExtensionFileLoader(name, path) if code is None else _Loader(name, path, self)
        spec = ModuleSpec(name, loader, origin=path, is_package=folder is not None)
        spec.submodule_search_locations = None if folder is None else [folder]
        spec.has_location, spec.cached = True, cached
        return spec

    def keep(self) -> None:
        """Write the file, unless it has all that was imported since this object was made."""
        sources: dict[str, Any] = {
            name: module.__spec__
            for name, module in list(sys.modules.items())
            if name not in self._earlier and _has_file(getattr(module, "__spec__", None))
        }
        if sys.dont_write_bytecode or self._known.issuperset(sources):
            return
        try:
            data = self._read(sources)
            os.makedirs(os.path.dirname(self.path), mode=0o700, exist_ok=True)  # noqa: PTH103, PTH120
            temporary = f"{self.path}.{os.getpid()}"
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(fd, "wb") as file:  # noqa: PTH123
                file.write(data)
            os.replace(temporary, self.path)  # noqa: PTH105
        except (OSError, ImportError, SyntaxError):
            pass  # no space, or sources that change at this moment: the next boot is slower

    def _read(self, sources: dict[str, Any]) -> bytes:
        """What is to be in the file, from the sources as they are now."""
        modules = dict(self.modules)
        stamps = {path: _stamp(path) for path in [*sys.path, *(m[0] for m in modules.values())]}
        for name, spec in sources.items():
            path, folders, code = spec.origin, spec.submodule_search_locations, None
            stamps[path] = _stamp(path)  # before the code is read: what changes later is noticed
            if isinstance(spec.loader, SourceFileLoader):
                code = marshal.dumps(SourceFileLoader(name, path).get_code(name))
            modules[name] = path, spec.cached, folders[0] if folders else None, code
        return marshal.dumps((self._python, list(stamps.items()), modules))


class _Loader(SourceFileLoader):
    """Of a module in Python whose code is at hand."""

    def __init__(self, name: str, path: str, codes: Codes) -> None:
        super().__init__(name, path)
        self._codes = codes

    def get_code(self, name: str) -> CodeType | None:
        code = self._codes.modules.pop(name, (None,))[-1]  # a module is loaded once
        return super().get_code(name) if code is None else marshal.loads(code)


def _has_file(spec: ModuleSpec | None) -> bool:
    return spec is not None and isinstance(spec.loader, (SourceFileLoader, ExtensionFileLoader))


def _stamp(path: str) -> tuple[int, int] | None:
    """What changes with a file, or with the names in a folder."""
    try:
        status = os.stat(path)  # noqa: PTH116
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns
