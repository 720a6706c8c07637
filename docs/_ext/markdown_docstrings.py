"""Docstrings as they are written here: Google's sections, and Markdown's code and lists.

Autodoc reads reStructuredText. What differs is rewritten before: fenced and indented code becomes
a literal block, a table a list-table, and a list gets the blank lines that it needs there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from sphinx.application import Sphinx
from sphinx.ext.napoleon import GoogleDocstring

FENCE = re.compile(r"(\s*)```(\S*)")
ITEM = re.compile(r"\s*(?:[-*]|\d+\.) ")
SECTION = re.compile(
    r"\s*(?:Args|Attributes|Example|Examples|Note|Raises|Returns|See Also|Warning|Yields):$"
)
ROW = re.compile(r"(\s*)\|(.*)\|\s*")
RULE = re.compile(r"[\s|:-]+")
RESULT = re.compile(r"\s*(?:Returns|Yields):$")


def indentation(line: str) -> int:
    """How many spaces a line starts with."""
    return len(line) - len(line.lstrip())


def tables(lines: list[str]) -> Iterator[str]:
    """The lines with tables as list-tables."""
    inside = False
    for line in lines:
        row = ROW.fullmatch(line)
        if row is None:
            if inside and line.strip():
                yield ""
            inside = False
            yield line
            continue
        if not inside:
            yield from ("", f"{row[1]}.. list-table::", "")
            inside = True
        if not RULE.fullmatch(line):
            for column, cell in enumerate(row[2].split("|")):
                yield f"{row[1]}   {'-' if column else '* -'} {cell.strip()}".replace(
                    "   - ", "     - ", 1
                )


def rewrite(lines: list[str]) -> list[str]:
    """The lines of a docstring as reStructuredText, Google's sections left as they are."""
    result: list[str] = []
    fenced = False
    text = 0  # indentation of the paragraph above
    literal = False
    for line in tables(lines):
        fence = FENCE.match(line)
        if fenced:
            if fence:
                fenced = False
                result.append("")
            else:
                result.append(" " * 3 + line)
            continue
        if fence:
            fenced = True
            result += ["", f"{fence[1]}.. code-block:: {fence[2] or 'text'}", ""]
            continue
        if line.strip():
            if RESULT.match(result[-1] if result else ""):
                # Without a type before it: signatures have the types.
                line = f"{' ' * indentation(line)}: {line.lstrip()}"
            above = result[-1] if result else ""
            deeper = indentation(line) > text
            if literal and not deeper:
                literal = False
            if not literal and not above.strip() and deeper and result:
                before = next((each for each in reversed(result) if each.strip()), "")
                if before and not ITEM.match(before) and not before.lstrip().startswith(".. "):
                    if not before.endswith("::") and not SECTION.match(before):
                        result += [" " * text + "::", ""]
                    literal = True
            if not literal:
                starts_list = ITEM.match(line) and above.strip() and not ITEM.match(above)
                if starts_list and indentation(line) <= text and not SECTION.match(above):
                    result.append("")
                text = indentation(line)
        result.append(line)
    return result


_values: dict[str, list[str]] = {}


def before_napoleon(
    _app: Sphinx, what: str, name: str, _object: object, _options: object, lines: list[str]
) -> None:
    """Rewrite a docstring in place."""
    lines[:] = rewrite(lines)
    if what in ("attribute", "data", "property"):
        _values[name] = lines[:]


def after_napoleon(
    app: Sphinx, what: str, name: str, item: object, options: Any, lines: list[str]
) -> None:
    """Put the docstring of a value back: napoleon takes all before its first colon for a type."""
    if what in ("attribute", "data", "property"):
        docstring = GoogleDocstring(_values[name], app.config, app, "method", name, item, options)
        lines[:] = [*docstring.lines(), ""]


def setup(app: Sphinx) -> dict[str, bool]:
    """Come before and after napoleon."""
    app.connect("autodoc-process-docstring", before_napoleon, priority=400)
    app.connect("autodoc-process-docstring", after_napoleon, priority=600)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
