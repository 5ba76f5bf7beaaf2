"""Check the documentation as it is read in the repository: relative links resolve, and their anchors exist.

Reads ``README.md``, ``CONTRIBUTING.md`` and every Markdown file under ``docs/``. Prints one line per problem and exits
with status 1 when there is any. Standard library only. Links within the site are checked when it is built, and a test
runs the code blocks.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parent.parent
REQUIRED = ("README.md", "CONTRIBUTING.md")

FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,}|~{3,}) *(?P<language>[\w+-]*)")
INLINE_CODE = re.compile(r"(`+)(?!`).*?(?<!`)\1(?!`)")
LINK = re.compile(r"\]\(\s*<?(?P<target>[^\s()<>]+(?:\([^\s()]*\)[^\s()<>]*)*)>?(?:\s+[\"'][^\"']*[\"'])?\s*\)")
DEFINITION = re.compile(r"^ {0,3}\[[^\]^]+\]: *<?(?P<target>[^\s>]+)")
ATTRIBUTE = re.compile(r"<(?:a|img|source)\b[^>]*?\b(?:href|src)=\"(?P<target>[^\"]+)\"", re.IGNORECASE)
HEADING = re.compile(r"^#{1,6} +(?P<title>.+?) *#*$")
ANCHOR = re.compile(r"\b(?:id|name)=\"(?P<anchor>[^\"]+)\"")
EXTERNAL = re.compile(r"^(?:[a-z][a-z0-9+.-]*:|//)", re.IGNORECASE)


class Page:
    """One Markdown file: ``prose`` without fenced code as (line, text), ``blocks`` as (line, language, code)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.prose: list[tuple[int, str]] = []
        self.blocks: list[tuple[int, str, str]] = []
        self._split(path.read_text(encoding="utf-8").splitlines())

    def _split(self, lines: list[str]) -> None:
        fence: re.Match[str] | None = None
        code: list[str] = []
        start = 0
        for number, line in enumerate(lines, 1):
            if fence is None:
                fence = FENCE.match(line)
                if fence is None:
                    self.prose.append((number, line))
                code, start = [], number + 1
            elif line.strip() and set(line.strip()) == {fence["ticks"][0]} and len(line.strip()) >= len(fence["ticks"]):
                self.blocks.append((start, fence["language"].lower(), textwrap.dedent("\n".join(code)) + "\n"))
                fence = None
            else:
                code.append(line)
        if fence is not None:
            raise SystemExit(f"{self.path.relative_to(ROOT)}:{start - 1}: this code block is never closed")

    def links(self) -> Iterator[tuple[int, str]]:
        """Every link target outside code, with its line."""
        for number, line in self.prose:
            text = INLINE_CODE.sub("", line)
            for pattern in (LINK, DEFINITION, ATTRIBUTE):
                for match in pattern.finditer(text):
                    yield number, match["target"]

    def anchors(self) -> set[str]:
        """What a link may name after ``#``: GitHub's slug of each heading, and explicit ids."""
        found: set[str] = set()
        for _, line in self.prose:
            found.update(match["anchor"] for match in ANCHOR.finditer(line))
            if heading := HEADING.match(line):
                slug = unique = slugify(heading["title"])
                count = 0
                while unique in found:
                    count += 1
                    unique = f"{slug}-{count}"
                found.add(unique)
        return found


def slugify(title: str) -> str:
    """GitHub's anchor of a heading: the text in lower case, punctuation gone, spaces as hyphens."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", title).replace("`", "").replace("*", "")
    return re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")


def check_links(page: Page) -> Iterator[str]:
    """One line for each relative link of the page that leads nowhere."""
    for number, target in page.links():
        if EXTERNAL.match(target):
            continue
        where = f"{page.path.relative_to(ROOT)}:{number}"
        name, _, anchor = target.partition("#")
        path = page.path if not name else (page.path.parent / unquote(name.partition("?")[0])).resolve()
        if not path.exists():
            yield f"{where}: {target} does not exist"
        elif path != ROOT and ROOT not in path.parents:
            yield f"{where}: {target} lies outside the repository"
        elif anchor and path.suffix == ".md" and unquote(anchor).lower() not in Page(path).anchors():
            yield f"{where}: {target}: {path.relative_to(ROOT)} has no such heading"


def main() -> int:
    """Check every page; the exit status."""
    missing = [f"{name} does not exist" for name in REQUIRED if not (ROOT / name).is_file()]
    paths = [ROOT / name for name in REQUIRED if (ROOT / name).is_file()] + sorted((ROOT / "docs").rglob("*.md"))
    pages = [Page(path) for path in paths]
    problems = missing + [problem for page in pages for problem in check_links(page)]
    for problem in problems:
        print(problem, file=sys.stderr)
    links = sum(1 for page in pages for _ in page.links())
    print(f"{len(pages)} pages, {links} links: {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
