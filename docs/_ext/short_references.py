"""References to names as annotations give them: without their module.

What is imported for type checkers alone is not evaluated, so autodoc knows such a name only as it
is written. It is looked up among all that is documented, in the same package first. Names that the
module takes from elsewhere, or defines without documenting them, stay text, since no network is
asked where other projects are described; a name that the module does not know is a warning.
"""

from __future__ import annotations

import ast
import builtins
import functools
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.transforms.post_transforms import SphinxPostTransform

OWN = ("kvm_ioctls", "vm_memory", "virtio_queue", "linux_loader", "vmm_reference")


@functools.cache
def names_of(module: str) -> dict[str, str]:
    """The names that a module's source imports or defines, each with the module it is from."""
    found: dict[str, str] = {}
    source = getattr(sys.modules.get(module), "__file__", None)
    for node in ast.walk(ast.parse(Path(source).read_text())) if source else ():
        match node:
            case ast.ImportFrom(names=names):
                origin = "" if node.level else f"{node.module}"
                found |= {alias.asname or alias.name: origin for alias in names}
            case ast.Import(names=names):
                found |= {alias.asname or alias.name: alias.name for alias in names}
            case ast.ClassDef(name=name):
                found[name] = module
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                found[name] = module
    return found


def is_ours(target: str) -> bool:
    """Whether a full name is one of ours, though nothing documents it."""
    module, _, name = target.rpartition(".")
    return module.partition(".")[0] in OWN and hasattr(sys.modules.get(module), name)


def is_foreign(target: str, module: str) -> bool:
    """Whether a name belongs to Python or to another project."""
    first, _, rest = target.partition(".")
    origin = names_of(module).get(first)
    if origin:
        return origin.partition(".")[0] not in OWN
    return first not in OWN if rest else hasattr(builtins, target)


class FullNames(SphinxPostTransform):
    """Write the full name into each reference that gives a short one."""

    default_priority = 5  # before references are resolved

    def run(self, **_arguments: Any) -> None:
        """Go through a page."""
        objects = self.env.domains["py"].objects  # type: ignore[attr-defined] # of this domain
        for node in self.document.findall(pending_xref):
            target, module = str(node["reftarget"]), str(node.get("py:module") or "")
            if node.get("refdomain") != "py" or target in objects:
                continue
            if is_foreign(target, module):
                node.attributes.pop("refspecific", None)  # `type` is not any attribute of that name
                continue
            ending = f".{target.lstrip('.')}"
            package = f"{module.partition('.')[0]}."
            found = [name for name in objects if name.endswith(ending)]
            found.sort(key=lambda name: (not name.startswith(package), name.count("."), name))
            if found:
                node["reftarget"] = found[0]


def leave_as_text(
    _app: Sphinx, _env: BuildEnvironment, node: pending_xref, text: nodes.TextElement
) -> nodes.Node | None:
    """Accept a name that is known though it is not documented."""
    if node.get("refdomain") != "py":
        return None
    target, module = str(node["reftarget"]), str(node.get("py:module") or "")
    first, last = target.partition(".")[0], target.rpartition(".")[2]
    if is_foreign(target, module) or first in names_of(module):
        return text
    return text if is_ours(target) or last.startswith("_") else None


def setup(app: Sphinx) -> dict[str, bool]:
    """Come in before Sphinx looks, and where it has found nothing."""
    app.add_post_transform(FullNames)
    app.connect("missing-reference", leave_as_text)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
