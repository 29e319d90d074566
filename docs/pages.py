"""What the site needs besides mkdocs.yml, which names this file as a hook of mkdocs and as an extension of griffe.

Pages that lie outside docs/ are part of the site. A link stands in a file as it is right in the repository
(`../benchmarks/NOTES.md`); in the site README.md is index.md, and what is in docs/ lies at the top.

Docstrings name parameters that share a meaning together (`weight, bias: [C]`); in the site each is an item of its own.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from griffe import Extension
from mkdocs.structure.files import File
from pygments.formatters import HtmlFormatter

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "benchmarks/*.md", "benchmarks/results/*.png")
LINK = re.compile(r"(?<=\]\()(?!https?:|#)([^)#\s]+)")
TOGETHER = re.compile(r"^( +)((?:\w+, )+\w+): (.*(?:\n\1 +.*)*)", re.M)
CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.S)


def in_site(path: str) -> str:
    """Where a file of the repository lies in the site."""
    return "index.md" if path == "README.md" else path.removeprefix("docs/")


def in_repository(uri: str) -> str:
    """The file of the repository that is a page of the site."""
    if uri == "index.md":
        return "README.md"
    return uri if not (ROOT / "docs" / uri).exists() else f"docs/{uri}"


def on_files(files, config):
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, in_site(path.relative_to(ROOT).as_posix()), abs_src_path=str(path)))
    colours = HtmlFormatter(style="friendly").get_style_defs(".highlight")
    files.append(File.generated(config, "highlight.css", content=colours))
    return files


def on_page_markdown(markdown, page, config, files):
    here = in_repository(page.file.src_uri)

    def moved(match: re.Match) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(here), match[1]))
        return posixpath.relpath(in_site(target), posixpath.dirname(page.file.src_uri) or ".")

    parts = CODE.split(markdown)
    return "".join(part if i % 2 else LINK.sub(moved, part) for i, part in enumerate(parts))


class NamedTogether(Extension):
    """Gives each of several parameters that a docstring names together an item of its own."""

    def on_object(self, *, obj, **kwargs):
        if obj.docstring and "Args:\n" in obj.docstring.value:
            before, arguments = obj.docstring.value.split("Args:\n", 1)
            arguments, *rest = re.split(r"(?=\n\n)", arguments, maxsplit=1)
            each = lambda m: "\n".join(f"{m[1]}{name}: {m[3]}" for name in m[2].split(", "))
            obj.docstring.value = "".join([before, "Args:\n", TOGETHER.sub(each, arguments), *rest])
