"""The floors: who may import whom, and who may touch what torch keeps to itself."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.utils.data.dataloader as torch_dataloader

import robustloader

ROOT = Path(robustloader.__file__).parent

FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "events", "policies"),
    ("decisions", "state"),
    ("telemetry", "system", "transport"),
    ("worker",),
    ("engine",),
    ("sampling", "loader", "checkup", "tuning", "__init__"),
    ("integrations", "testing", "report", "cli", "__main__"),
)
"""Bottom to top; on one floor, left to right. A room imports lower floors, its left neighbours, and itself."""

PLACES = {room: (floor, place) for floor, rooms in enumerate(FLOORS) for place, room in enumerate(rooms)}
TELEMETRY_LOOKS_AT = 1
"""telemetry is a wing of the ground floor: it imports floors 0 and 1 only."""

PURE = ("errors", "events", "policies", "decisions", "state", "telemetry")
IMPURE_LIBRARIES = ("torch", "multiprocessing")
DOOR = "system.torch_private"


@dataclass(frozen=True)
class Import:
    """One imported module.

    Attributes:
        lazy: inside a function.
    """

    name: str
    line: int
    lazy: bool


def imports_of(tree: ast.Module, module: str) -> Iterator[Import]:
    """Everything a module imports when it runs; what only a type checker sees does not count."""
    yield from _imports(tree, module, lazy=False)


def _imports(node: ast.AST, module: str, *, lazy: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            for other in child.orelse:
                yield from _imports(other, module, lazy=lazy)
            continue
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, child.lineno, lazy)
        elif isinstance(child, ast.ImportFrom):
            base = child.module or ""
            if child.level:
                package = f"robustloader.{module}".split(".")[: -child.level]
                base = ".".join([*package, *([base] if base else [])])
            for alias in child.names:
                yield Import(f"{base}.{alias.name}", child.lineno, lazy)
        inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        yield from _imports(child, module, lazy=lazy or inside)


def room_of(module: str) -> str:
    """The first part of a module's name within the package."""
    return module.split(".")[0] or "__init__"


def our_module(name: str) -> str | None:
    """The module of ours that an imported name is, or lies in; None for somebody else's."""
    if name != "robustloader" and not name.startswith("robustloader."):
        return None
    inner = name.removeprefix("robustloader").removeprefix(".")
    if room_of(inner) not in PLACES and not (ROOT / room_of(inner)).exists():
        return "__init__"
    return inner or "__init__"


def misplaced_imports(source: str, module: str) -> list[str]:
    """What a module imports from a floor, or a neighbour, that it may not."""
    wrong = []
    room = room_of(module)
    floor, place = PLACES[room]
    for found in imports_of(ast.parse(source), module):
        target = our_module(found.name)
        if target is None or room_of(target) == room:
            continue
        other_floor, other_place = PLACES.get(room_of(target), (99, 99))
        allowed = other_floor < floor or (other_floor == floor and other_place < place)
        if room == "telemetry":
            allowed = other_floor <= TELEMETRY_LOOKS_AT
        if not allowed:
            wrong.append(f"{module}:{found.line} imports {found.name}")
    return wrong


def impure_imports(source: str, module: str) -> list[str]:
    """Imports of torch or multiprocessing that run with the module itself."""
    return [
        f"{module}:{found.line} imports {found.name}"
        for found in imports_of(ast.parse(source), module)
        if not found.lazy and found.name.split(".")[0] in IMPURE_LIBRARIES
    ]


@cache
def torchs_private_names() -> frozenset[str]:
    """Every underscore name that torch's loader and its iterators define: methods, and attributes set on ``self``."""
    names: set[str] = set()
    for kind in (
        torch_dataloader.DataLoader,
        torch_dataloader._BaseDataLoaderIter,
        torch_dataloader._SingleProcessDataLoaderIter,
        torch_dataloader._MultiProcessingDataLoaderIter,
    ):
        tree = ast.parse(inspect.getsource(kind))
        names |= _defined(tree)
    return frozenset(names)


def _defined(tree: ast.AST) -> set[str]:
    """Underscore names that classes in a tree define."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            names.add(node.name)
        elif isinstance(node, ast.ClassDef):
            for part in node.body:
                if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                    names.add(part.target.id)
                elif isinstance(part, ast.Assign):
                    names.update(target.id for target in part.targets if isinstance(target, ast.Name))
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id == "self"
        ):
            names.add(node.attr)
    return {name for name in names if _private(name)}


def _private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def torch_underscores(source: str, module: str) -> list[str]:
    """Where a module imports or uses what torch keeps to itself."""
    tree = ast.parse(source)
    own = _defined(tree)
    wrong = [
        f"{module}:{found.line} imports {found.name}"
        for found in imports_of(tree, module)
        if found.name.split(".")[0] == "torch" and any(_private(part) for part in found.name.split("."))
    ]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not _private(node.attr):
            continue
        root: ast.expr = node
        while isinstance(root, ast.Attribute):
            root = root.value
        of_torch = isinstance(root, ast.Name) and root.id == "torch"
        if of_torch or (node.attr in torchs_private_names() and node.attr not in own):
            wrong.append(f"{module}:{node.lineno} uses {node.attr}")
    return wrong


def offered(source: str) -> frozenset[str] | None:
    """The names in a module's ``__all__``; None where it has none."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return frozenset(ast.literal_eval(node.value))
    return None


def names_not_offered(source: str, module: str, all_of: Callable[[str], frozenset[str] | None]) -> list[str]:
    """What a module takes from others of ours, by ``from`` or through the module's name, that is not in their
    ``__all__``. Absolute imports, the only ones there are."""
    tree = ast.parse(source)
    aliases: dict[str, str] = {}
    taken: list[tuple[int, str, str]] = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or our_module(node.module or "") is None:
            continue
        assert node.module is not None
        for alias in node.names:
            inner = f"{node.module}.{alias.name}".removeprefix("robustloader.")
            if inner in MODULES:
                aliases[alias.asname or alias.name] = inner
            else:
                taken.append((node.lineno, our_module(node.module) or "", alias.name))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            taken.append((node.lineno, aliases[node.value.id], node.attr))
    wrong = []
    for line, owner, name in taken:
        names = all_of(owner)
        if names is not None and name not in names:
            wrong.append(f"{module}:{line} takes {name} of {owner}")
    return wrong


def modules() -> dict[str, Path]:
    """Our modules by their names within the package."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        if parts[-1] == "__init__" and len(parts) > 1:
            parts.pop()
        found[".".join(parts)] = path
    return found


MODULES = modules()
every_module = pytest.mark.parametrize("module", MODULES)


@every_module
def test_every_module_has_a_floor(module: str) -> None:
    """A new room is entered in FLOORS first."""
    assert room_of(module) in PLACES


@every_module
def test_imports_go_down_or_left(module: str) -> None:
    """A module imports lower floors, left neighbours and its own package, nothing else of ours."""
    assert misplaced_imports(MODULES[module].read_text(), module) == []


@every_module
def test_the_ground_floors_are_pure(module: str) -> None:
    """Floors 0 and 1 and telemetry import neither torch nor multiprocessing, nor a module of ours that does."""
    if room_of(module) not in PURE:
        pytest.skip("above the ground floors")
    todo, seen, wrong = [module], set(), []
    while todo:
        name = todo.pop()
        # ``import robustloader.x`` also runs the package's own __init__, as it must: that does not count.
        if name in seen or name == "__init__":
            continue
        seen.add(name)
        source = MODULES[name].read_text()
        wrong += impure_imports(source, name)
        for found in imports_of(ast.parse(source), name):
            target = our_module(found.name)
            while target is not None and target not in MODULES and "." in target:
                target = target.rpartition(".")[0]
            if target is not None and target in MODULES and not found.lazy:
                todo.append(target)
    assert wrong == []


@every_module
def test_only_one_module_names_torchs_underscores(module: str) -> None:
    """Everything that torch keeps to itself goes through system/torch_private.py."""
    if module == DOOR:
        pytest.skip("the one door")
    assert torch_underscores(MODULES[module].read_text(), module) == []


def test_the_door_is_there() -> None:
    """The exception is not a dead name, and it is needed."""
    assert torch_underscores(MODULES[DOOR].read_text(), DOOR)


@every_module
def test_what_others_take_is_in_all(module: str) -> None:
    """``__all__`` says what the rest of the package may use, and leaves nothing out that it does use."""

    def all_of(owner: str) -> frozenset[str] | None:
        return offered(MODULES[owner].read_text()) if owner in MODULES else None

    assert names_not_offered(MODULES[module].read_text(), module, all_of) == []


def test_the_imports_of_a_pure_module_are_really_few() -> None:
    """The tests above read the source; this one imports a pure library of ours' dependencies and looks."""
    import subprocess
    import sys

    libraries = sorted(
        {
            found.name.split(".")[0]
            for module in MODULES
            if room_of(module) in PURE
            for found in imports_of(ast.parse(MODULES[module].read_text()), module)
            if not found.lazy and our_module(found.name) is None
        }
    )
    code = f"import sys\nfor name in {libraries!r}: __import__(name)\nsys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- the checks can fail ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("errors", "from robustloader.policies import Retry"),
        ("policies", "def f():\n    from robustloader.engine.pool import Pool"),
        ("decisions.blame", "import robustloader.telemetry.summary"),
        ("telemetry.recorder", "from robustloader.system import host"),
        ("system.host", "from robustloader.transport import codec"),
        ("transport.codec", "from robustloader import worker"),
        ("worker.fetch", "from ..engine import pool"),
        ("engine.pool", "from robustloader import RobustDataLoader"),
        ("engine.pool", "from robustloader.loader import RobustDataLoader"),
        ("loader", "if True:\n    import robustloader"),
        ("testing.inject", "from robustloader.cli import main"),
    ],
)
def test_a_misplaced_import_is_seen(module: str, source: str) -> None:
    """Upwards, to the right, at the top or inside a function."""
    assert len(misplaced_imports(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("policies", "from robustloader.errors import OptionError"),
        ("errors", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from robustloader.events import Event"),
        ("telemetry.recorder", "from robustloader.events import Event\nfrom robustloader.telemetry import histogram"),
        ("transport.channel", "from robustloader.system.host import x\nfrom . import codec"),
        ("cli.demo", "from robustloader import RobustDataLoader\nimport robustloader.tuning"),
        ("engine.pool", "import torch\nfrom multiprocessing import util"),
    ],
)
def test_a_proper_import_is_fine(module: str, source: str) -> None:
    """Downwards, to the left, within the package, and what only type checkers see."""
    assert misplaced_imports(source, module) == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch",
        "from torch.utils import data",
        "import multiprocessing as mp",
        "try:\n    import torch\nfinally: 0",
    ],
)
def test_an_impure_import_is_seen(source: str) -> None:
    """However it is written; but not inside a function, where it is somebody's choice."""
    assert len(impure_imports(source, "policies")) == 1
    assert impure_imports("def f():\n    import torch", "policies") == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch._utils",
        "from torch._utils import ExceptionWrapper",
        "from torch.utils.data import _utils",
        "from torch.utils.data.dataloader import _BaseDataLoaderIter as Base",
        "import torch\ntorch._C._log_api_usage_once('x')",
        "import torch\ntorch.utils.data._utils",
        "def f(loader):\n    return loader._index_sampler",
        "class A(B):\n    def f(self):\n        return self._num_yielded",
        "class A(B):\n    def f(self):\n        self._sampler_iter.x = 1",
    ],
)
def test_a_torch_underscore_is_seen(source: str) -> None:
    """Imported, reached through ``torch``, or used as an attribute of a loader or an iterator."""
    assert torch_underscores(source, "engine.pool")


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.__version__",
        "class A:\n    def __init__(self):\n        self._dataset = 1\n    def f(self):\n        return self._dataset",
        "class A:\n    _iterator: int\n    def f(self):\n        return self._iterator",
        "def f(x):\n    return x._something_of_ours",
    ],
)
def test_our_own_underscores_are_fine(source: str) -> None:
    """Names that a class of the same module defines are that module's own business."""
    assert torch_underscores(source, "engine.pool") == []


def test_torchs_names_are_found() -> None:
    """The set is read from torch's source: these have been there for years."""
    assert {"_iterator", "_index_sampler", "_get_iterator", "_workers", "_next_data", "_shutdown_workers"} <= (
        torchs_private_names()
    )
    assert torch.__version__


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("from robustloader.system.host import SharedPage, page", 1),
        ("from robustloader.system import host\nhost.SharedPage(), host.page()", 1),
        ("def f():\n    from robustloader.system import host as machine\n    machine.page", 1),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from robustloader.system.host import page", 1),
        ("from robustloader.system.host import SharedPage as page\npage", 0),
        ("from robustloader.system.limits import page", 0),
        ("from os import page\nimport torch\ntorch.page", 0),
    ],
)
def test_a_name_that_is_not_offered_is_seen(source: str, wrong: int) -> None:
    """Imported alone or used through its module, anywhere; a module without ``__all__`` offers everything."""

    def all_of(owner: str) -> frozenset[str] | None:
        return offered('__all__ = ["SharedPage"]') if owner == "system.host" else offered("page = 1")

    assert len(names_not_offered(source, "engine.pool", all_of)) == wrong
