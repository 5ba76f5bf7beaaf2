"""Result files of long runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_json(path: Path, result: dict[str, Any], *, table: str = "") -> None:
    """Write a result in one step: who is interrupted leaves the old file or the new one.

    Args:
        path: of the file.
        result: plain JSON.
        table: the key of a dictionary with many entries, each of which gets one line.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = result.get(table, {})
    text = json.dumps({**result, table: {}} if rows else result, indent=1)
    if rows:
        lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(row)}" for key, row in rows.items())
        text = text.replace(f"{json.dumps(table)}: {{}}", f"{json.dumps(table)}: {{\n{lines}\n }}")
    beside = path.with_name(f"{path.name}.new")
    beside.write_text(text + "\n")
    beside.replace(path)
