"""What users may import: the package's face, and the subpackages that are meant for them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2] / "robustloader"
PUBLIC = ("__init__.py", "testing/__init__.py", "testing/pytest_plugin.py", "integrations/*.py")
"""Modules whose ``__all__`` is a promise. They are read, not imported: an integration needs its framework."""


def public_names() -> Iterator[tuple[str, str]]:
    """Module and name of everything that is promised."""
    for pattern in PUBLIC:
        for path in sorted(ROOT.glob(pattern)):
            parts = path.relative_to(ROOT.parent).with_suffix("").parts
            module = ".".join(part for part in parts if part != "__init__")
            yield from ((module, name) for name in _promised(path))


def _promised(path: Path) -> list[str]:
    """The names in ``__all__``; a private module has none."""
    if path.stem.startswith("_") and path.stem != "__init__":
        return []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return [str(name) for name in ast.literal_eval(node.value)]
    return []
