"""The documentation site is built without a warning, is complete, and needs no network to be read."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytest.importorskip("mkdocs", reason="the site needs the extra docs: pip install 'robustloader[docs]'")

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 85

FETCHED = {
    "script": ("src",), "img": ("src", "srcset"), "source": ("src", "srcset"), "iframe": ("src",), "embed": ("src",),
    "video": ("src", "poster"), "audio": ("src",), "track": ("src",), "object": ("data",), "input": ("src",),
}  # fmt: skip
"""Attributes whose target a browser fetches by itself. Of ``link``, all but the relations below."""
NOT_FETCHED = {"canonical", "prev", "next", "author", "license", "alternate"}
CSS_URL = re.compile(r"url\(\s*['\"]?(?P<target>[^'\")]+)|@import\s+['\"](?P<imported>[^'\"]+)")
WITH_HOST = re.compile(r"^(?:[a-z][a-z0-9+.-]*:)?//", re.IGNORECASE)


class Anatomy(HTMLParser):
    """What a page fetches, where it leads, and which places in it can be led to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.places: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        if "id" in found:
            self.places.add(found["id"])
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if tag == "link" and not NOT_FETCHED & set(found.get("rel", "").split()):
            self.fetched.append(found.get("href", ""))
        self.fetched += [found[name] for name in FETCHED.get(tag, ()) if name in found]
        self.fetched += css_targets(found.get("style", ""))


def css_targets(text: str) -> list[str]:
    return [match["target"] or match["imported"] for match in CSS_URL.finditer(text)]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    target = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(target)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return target


@pytest.fixture(scope="module")
def anatomies(site: Path) -> dict[Path, Anatomy]:
    return {path: Anatomy(path) for path in site.rglob("*.html")}


def test_nothing_is_fetched_from_a_network(site: Path, anatomies: dict[Path, Anatomy]) -> None:
    """No page, style sheet or picture names a script, style, font or picture on another host."""
    fetched = {(path.name, target) for path, anatomy in anatomies.items() for target in anatomy.fetched}
    for path in (*site.rglob("*.css"), *site.rglob("*.svg")):
        fetched |= {(path.name, target) for target in css_targets(path.read_text(encoding="utf-8"))}
    assert len(fetched) > len(anatomies)
    assert not {(name, target) for name, target in fetched if WITH_HOST.match(target)}


def test_links_lead_somewhere(site: Path, anatomies: dict[Path, Anatomy]) -> None:
    """Within the site each link has its page, and the page has the place that is named."""
    broken = []
    for path, anatomy in anatomies.items():
        if path.name == "404.html":  # served at any address
            continue
        for link in anatomy.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                broken.append((path.name, link))
            elif parts.fragment and target in anatomies:
                places = anatomies[target].places | {"", "__top"}
                if unquote(parts.fragment) not in places and not parts.fragment.startswith("__codelineno"):
                    broken.append((path.name, link))
    assert not broken


def test_every_page_can_be_found(anatomies: dict[Path, Anatomy]) -> None:
    """The front page's navigation leads to every page, but for the one that says that there is no such page."""
    front = next(path for path in anatomies if path.name == "index.html" and (path.parent / "404.html").exists())
    reached = {(front.parent / urlsplit(link).path).resolve() for link in anatomies[front].links}
    assert {path for path in anatomies if path.name != "404.html"} - {front} <= reached


def test_public_names_are_in_the_reference(anatomies: dict[Path, Anatomy]) -> None:
    """Each name of ``__all__``, of the package and of its public subpackages, has its place in the reference."""
    from docs.site.public import public_names

    places = set().union(*(anatomy.places for path, anatomy in anatomies.items() if path.parent.name == "reference"))
    missing = [f"{module}.{name}" for module, name in public_names() if f"{module}.{name}" not in places]
    assert not missing
