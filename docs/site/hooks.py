"""What the site has beyond the Markdown under docs/: pages made of the repository's own files, and links into it.

* The front page, the changelog and the guide for contributors are README.md, CHANGELOG.md and CONTRIBUTING.md.
* A link to any other file of the repository leads to a copy of it in the site.
* What is public and on no page of the reference gets a page of its own, so that the reference is always complete.
* In ``nav``, a pattern such as ``design/0*.md`` stands for all pages that it matches and nobody else names.
* ``<!-- help: doctor -->`` becomes what ``robustloader doctor --help`` prints.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from docs.site.public import public_names  # noqa: E402
from robustloader.cli import main  # noqa: E402

DOCS = ROOT / "docs"
FROM_ROOT = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
LINK = re.compile(r"(?P<before>\]\()(?P<path>[^()\s#:]+)(?P<after>(?:#[^()\s]*)?\))")
HELP = re.compile(r"<!-- help: (?P<command>[a-z]+) -->")
REST = "reference/rest.md"
SHOWN_AS_TEXT = (".py", ".toml", ".txt")
"""A browser would offer to save these: their copies end in ``.txt``."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Write the patterns in ``nav`` out, and name the page of what has no other one."""
    assert config.nav is not None
    config.nav = _expand(config.nav, set(_named(config.nav)))
    if _rest():
        reference = next(item["Reference"] for item in config.nav if isinstance(item, dict) and "Reference" in item)
        reference.append({"Everything else": REST})
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages that are kept at the root of the repository."""
    for source, page in FROM_ROOT.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    if names := _rest():
        content = "# Everything else\n\n" + "\n\n".join(f"::: {name}" for name in names) + "\n"
        files.append(File.generated(config, REST, content=content))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to where things are in the site, and fill in help texts."""
    at_root = {generated: source for source, generated in FROM_ROOT.items()}
    origin = ROOT / at_root[page.file.src_uri] if page.file.src_uri in at_root else DOCS / page.file.src_uri

    def lead(link: re.Match[str]) -> str:
        target = (origin.parent / link["path"]).resolve()
        if not target.is_file() or not target.is_relative_to(ROOT):
            return link[0]  # mkdocs itself tells of links that lead nowhere
        place = _place(target, files, config)
        return f"{link['before']}{os.path.relpath(place, Path(page.file.src_uri).parent)}{link['after']}"

    return HELP.sub(lambda match: _help(match["command"]), LINK.sub(lead, markdown))


def _rest() -> list[str]:
    """The public names that no page of the reference has."""
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (DOCS / "reference").glob("*.md"))
    placed = set(re.findall(r"^::: (\S+)$", pages, re.MULTILINE))
    return [name for module, short in public_names() if (name := f"{module}.{short}") not in placed]


def _place(target: Path, files: Files, config: MkDocsConfig) -> str:
    """Where a file of the repository is in the site; it is copied there if it was not."""
    name = target.relative_to(ROOT).as_posix()
    if name in FROM_ROOT:
        return FROM_ROOT[name]
    if target.is_relative_to(DOCS) and files.get_file_from_path(inside := target.relative_to(DOCS).as_posix()):
        return inside
    copy = "repository/" + name + (".txt" if target.suffix in SHOWN_AS_TEXT else "")
    if files.get_file_from_path(copy) is None:
        files.append(File.generated(config, copy, content=target.read_bytes()))
    return copy


def _help(command: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as printed, mock.patch.dict(os.environ, COLUMNS="90"):
        if main([command, "--help"]) != 0:
            raise ValueError(f"robustloader {command} --help failed")
    return f"```text\n{printed.getvalue().strip()}\n```"


def _named(nav: Any) -> Iterator[str]:
    """Every page that ``nav`` names."""
    if isinstance(nav, str):
        yield nav
    else:
        for item in nav.values() if isinstance(nav, dict) else nav:
            yield from _named(item)


def _expand(nav: Any, named: set[str]) -> Any:
    if isinstance(nav, dict):
        return {title: _expand(item, named) for title, item in nav.items()}
    if isinstance(nav, str):
        return nav
    expanded: list[Any] = []
    for item in nav:
        if isinstance(item, str) and "*" in item:
            found = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.glob(item))
            expanded += [page for page in found if page not in named]
        else:
            expanded.append(_expand(item, named))
    return expanded
