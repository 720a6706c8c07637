"""The site over all packages: `nox -s docs`.

A page of a package includes its README and documents its public modules, found by walking the
installed package, so that a new module needs no entry here. Every reference must resolve (`-n -W`).
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "vmm-reference"
author = "the vmm-reference contributors"
copyright = f"2026, {author}"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "package_pages",
    "markdown_docstrings",
    "short_references",
]
exclude_patterns = ["_build", "_ext"]
html_theme = "furo"
html_title = project
default_role = "code"  # docstrings use a single backtick

myst_heading_anchors = 4
suppress_warnings = ["myst.xref_missing"]  # a README's links to files lead out of the site

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_use_unqualified_type_names = True
