"""Directives for the page of a package: its public modules, and the documents it brings along."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

PACKAGES = Path(__file__).parents[2] / "packages"


def public_modules(package: str) -> list[str]:
    """The names of a package's modules without a leading underscore, the package itself first."""
    top = importlib.import_module(package)
    names = (module.name for module in pkgutil.walk_packages(top.__path__, f"{package}."))
    return [package, *(name for name in names if "._" not in name)]


def members(name: str) -> str:
    """The option of automodule that documents each thing where it is defined, and only there."""
    module = importlib.import_module(name)
    if not hasattr(module, "__path__"):
        return ":members:"
    # What a package hands on from its modules is documented there.
    homes = {key: getattr(value, "__module__", "") for key, value in vars(module).items()}
    here = [each for each in getattr(module, "__all__", ()) if homes.get(each) == name]
    return f":members: {', '.join(here)}" if here else ":no-members:"


class Api(SphinxDirective):
    """`{api} PACKAGE`: a section for each public module of an import package."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Write the sections."""
        result: list[nodes.Node] = []
        for name in public_modules(self.arguments[0]):
            text = f"```{{eval-rst}}\n.. automodule:: {name}\n   {members(name)}\n```\n"
            section = nodes.section(ids=[nodes.make_id(f"module-{name}")], names=[name])
            section += nodes.title("", "", nodes.literal(text=name))
            section += self.parse_text_to_nodes(text, allow_section_headings=True)
            result.append(section)
        return result


class Documents(SphinxDirective):
    """`{documents} PACKAGE`: what lies in `packages/PACKAGE/docs/`, if anything does."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Include the documents in the order of their names."""
        result: list[nodes.Node] = []
        for file in sorted((PACKAGES / self.arguments[0] / "docs").rglob("*.md")):
            self.env.note_dependency(str(file))
            result += self.parse_text_to_nodes(file.read_text(), allow_section_headings=True)
        return result


def setup(app: Sphinx) -> dict[str, bool]:
    """Add the directives."""
    app.add_directive("api", Api)
    app.add_directive("documents", Documents)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
