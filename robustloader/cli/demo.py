"""``robustloader demo``: train on damaged files, with torch's loader and with this one, and check every claim.

The training loop knows nothing of faults. It runs with torch's ``DataLoader`` until that dies, once per situation, and
then with ``RobustDataLoader`` and the same arguments. Everything the demo says it has then checked.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import signal
import sys
import tempfile
import textwrap
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import active_children
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import nn
from torch.utils.data import DataLoader

from robustloader import FaultPolicy, FaultRecord, RobustDataLoader
from robustloader.cli.ending import CommandError, tell

if TYPE_CHECKING:
    from robustloader.cli.demo_data import DigitFiles, Material

__all__ = ["add_parser", "run"]

SEED = 20
BATCH = 64
GOAL = 0.95

Watch = Callable[[Any, torch.Tensor, float], None]


def add_parser(commands: Any) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser(
        "demo",
        help="train on damaged data, and see both loaders meet it",
        description="Write 1,797 handwritten digits as JPEG files, damage some, and train on them with two workers: "
        "first with torch's DataLoader, which dies of it, then with RobustDataLoader. Takes less than two minutes on "
        "two cores. The exit status is 0 when all claims hold and 1 when one does not.",
    )
    parser.add_argument(
        "--epochs", type=_whole(2, 100), default=3, metavar="N", help="epochs to train (2 to 100; default: 3)"
    )
    parser.add_argument(
        "--workers", type=_whole(1, 64), default=2, metavar="N", help="worker processes (1 to 64; default: 2)"
    )
    parser.add_argument(
        "--dir",
        type=_new_folder,
        metavar="PATH",
        help="write the files there and keep them (default: a temporary folder)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the demo; the exit status."""
    try:
        import tqdm  # noqa: F401

        from robustloader.cli import demo_data
    except ImportError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("PIL", "sklearn", "tqdm"):
            raise
        raise CommandError(f"{missing} is missing: pip install 'robustloader[demo]'") from error
    started = time.monotonic()
    show = Show(quiet=options.json)
    with _folder(options.dir) as folder:
        show.heading("1  The data")
        with show.bar("writing JPEG files", 1797) as bar:
            material = demo_data.write_files(folder, seed=SEED, written=bar)
        show.say(_describe(material, folder))
        result = Demo(material, folder, options.epochs, options.workers, show).run()
    result["duration_s"] = round(time.monotonic() - started, 1)
    result["folder"] = str(options.dir) if options.dir else None
    if options.json:
        tell(json.dumps(result, indent=2, default=str))
    held = sum(claim["holds"] for claim in result["claims"])
    show.say(f"\n{held} of {len(result['claims'])} claims hold, in {result['duration_s']} s")
    return 0 if result["ok"] else 1


class Demo:
    """One run of the demo after the files are written."""

    def __init__(self, material: Material, folder: Path, epochs: int, workers: int, show: Show) -> None:
        self.material = material
        self.folder = folder
        self.epochs = epochs
        self.workers = workers
        self.show = show
        self.claims: list[dict[str, Any]] = []
        self.pids: set[int] = set()

    def run(self) -> dict[str, Any]:
        """All chapters in order; the machine-readable result."""
        stock = self.show_stock()
        with warnings.catch_warnings():
            warnings.showwarning = self.show.warn
            training = self.show_robust()
            quarantine = self.show_quarantine()
        gc.collect()
        left = sorted(pid for pid in self.pids if psutil.pid_exists(pid))
        self.claim("no worker process is left behind", not left, f"pids {left}" if left else f"{len(self.pids)} lived")
        self.show.heading("5  What was claimed, and checked")
        for claim in self.claims:
            detail = f" ({claim['detail']})" if claim["detail"] else ""
            self.show.say(f"  {'holds' if claim['holds'] else 'FAILS'}  {claim['claim']}{detail}")
        ok = all(claim["holds"] for claim in self.claims)
        return {"ok": ok, "claims": self.claims, "stock": stock, **training, "quarantine": quarantine}

    def claim(self, text: str, holds: bool, detail: str = "") -> None:
        """Note one checked claim."""
        self.claims.append({"claim": text, "holds": bool(holds), "detail": detail})

    def show_stock(self) -> list[dict[str, str]]:
        """What torch's DataLoader does in each of the four situations."""
        self.show.heading("2  torch's DataLoader")
        self.show.say("    from torch.utils.data import DataLoader\n")
        material, train = self.material, self.material.train
        situations: list[tuple[str, DigitFiles, int | None, str]] = [
            ("a damaged file", train, None, r"(OSError|ValueError): Caught .* in DataLoader worker"),
            ("a storage that fails twice", train.without(material.lost), None, "ConnectionError: Caught"),
            (
                "a file that crashes its decoder",
                train.without({*material.damaged, material.hiccuping}),
                None,
                "RuntimeError: DataLoader worker|ConnectionResetError",
            ),
            (
                "a worker killed from outside",
                train.without({*material.lost, material.hiccuping}),
                3,
                "RuntimeError: DataLoader worker|ConnectionResetError",
            ),
        ]
        errors = []
        for situation, dataset, kill_at, expected in situations:
            error = self._die(dataset, kill_at)
            errors.append({"situation": situation, "error": error})
            self.show.say(f"  {situation}:")
            self.show.say("    " + (error or "it survived").replace("\n", "\n    "))
            self.claim(f"torch's DataLoader dies of {situation}", re.match(expected, error) is not None)
        gc.collect()  # iterators of torch's that are held some other way: Ctrl-C would be lost in their end
        return errors

    def _die(self, dataset: DigitFiles, kill_at: int | None) -> str:
        """Train an epoch with torch's loader; the essence of the error it dies of, or nothing if it lives."""
        loader = make_loader(DataLoader, dataset, self.workers)
        try:
            # What torch's workers print as they die is kept apart: it would read as if the demo had failed.
            with _stderr_into(self.folder / "torch-stderr.txt"):
                # torch may raise from a signal handler, so from any line of the loop: catch whatever comes.
                Trainer(1, len(loader)).train_epoch(iter(loader), Killer(kill_at))
        except Exception as error:
            # torch's error holds its own frame, and with it the iterator: its workers would linger until the garbage
            # collector came, and then take ten seconds to stop.
            traceback.clear_frames(error.__traceback__)
            return _essence(error)
        return ""

    def show_robust(self) -> dict[str, Any]:
        """Train with RobustDataLoader, then hold its books against what was delivered."""
        self.show.heading("3  The same loop, one import changed")
        self.show.say("  - from torch.utils.data import DataLoader")
        self.show.say("  + from robustloader import RobustDataLoader as DataLoader\n")
        loader = make_loader(RobustDataLoader, self.material.train, self.workers)
        trainer = Trainer(self.epochs, len(loader))
        killer = Killer(len(loader) // 2)
        books = []
        for epoch in range(self.epochs):
            book = Book()
            with self.show.bar(f"epoch {epoch}", len(loader)) as bar:
                batches = iter(loader)

                def watch(batches: Any, indices: torch.Tensor, loss: float, book: Book = book, bar: Any = bar) -> None:
                    book.enter(batches.batch_info, indices.tolist())
                    self.pids.update(worker_pids())
                    bar(1, f"loss {loss:.3f}")
                    killer(batches, indices, loss)

                trainer.train_epoch(batches, watch)
                replacement = worker_pids()
            books.append(book)
            self.show.say(textwrap.indent(str(loader.summary()), "  ") + "\n")
        test = make_loader(RobustDataLoader, self.material.test, self.workers, shuffle=False)
        accuracy = trainer.test(iter(test))
        self.show.say(f"  test accuracy: {accuracy:.1%} of {len(self.material.test)} images")
        self.claim(f"test accuracy is at least {GOAL:.0%}", accuracy >= GOAL, f"{accuracy:.1%}")
        self.claim(
            "the worker killed from outside in mid-epoch was replaced",
            killer.pid is not None and killer.pid not in replacement and len(replacement) == self.workers,
            f"pid {killer.pid}; now {replacement}",
        )
        records = list(loader.fault_log)
        self._check_books(books, len(loader))
        self._check_records(records)
        crashes = [summary.crashes for summary in loader.summaries]
        self.claim(
            "workers died in the first epoch only", crashes[0] >= 2 and not any(crashes[1:]), f"per epoch: {crashes}"
        )
        self._show_faults(records)
        loader.fault_log.save(self.folder / "faults.jsonl")
        return {
            "accuracy": accuracy,
            "epochs": [summary.to_dict() for summary in loader.summaries],
            "faults": dict(Counter(f"{record.kind}, {record.action}" for record in records)),
        }

    def _check_books(self, books: list[Book], batches: int) -> None:
        material = self.material
        everything = Counter(range(len(material.train)))
        lost = Counter(material.lost)
        healthy = everything - lost
        self.claim("each batch holds exactly what its batch_info says", not any(book.mistakes for book in books))
        self.claim(
            "every epoch has all its batches in full size",
            all(len(book.sizes) == batches and sum(book.sizes) == len(material.train) for book in books),
            f"{batches} batches, {len(material.train)} samples",
        )
        self.claim(
            "every healthy training sample is delivered exactly once per epoch, besides the recorded replacements",
            all(Counter(book.delivered) == healthy for book in books),
            f"{healthy.total()} samples",
        )
        self.claim(
            "every sample that cannot be loaded is replaced, once per epoch, and no other",
            all(Counter(wanted for wanted, _ in book.replaced) == lost for book in books),
            f"{lost.total()} samples",
        )
        self.claim(
            "only healthy training samples are used as replacements",
            all(healthy[used] for book in books for _, used in book.replaced),
        )

    def _check_records(self, records: list[FaultRecord]) -> None:
        material, epochs = self.material, range(self.epochs)
        paths = material.train.paths
        # A damaged file may fail more than once per epoch: asked for by the sampler, and tried as a replacement.
        failed = [r for r in records if r.kind == "exception" and r.action == "replaced"]
        self.claim(
            "every damaged file is recorded in every epoch, and no other",
            {(r.epoch, r.index) for r in failed} == {(epoch, index) for epoch in epochs for index in material.damaged},
            f"{len(material.damaged)} files",
        )
        self.claim("each such record names the file", all(str(paths[r.index]) in r.message for r in failed))
        retried = [r for r in records if r.action == "retried"]
        self.claim(
            "the file that fails twice is loaded at the third attempt in every epoch",
            {(r.epoch, r.index) for r in retried} == {(epoch, material.hiccuping) for epoch in epochs}
            and all(r.attempts == 3 for r in retried),
        )
        poison = {r.index for r in records if r.kind == "poison"}
        self.claim(
            "the file that crashes its decoder is convicted, and nothing else is",
            poison == {material.crashing},
            paths[material.crashing].name,
        )

    def _show_faults(self, records: list[FaultRecord]) -> None:
        """The first epoch's records a line each, the others' counted."""
        self.show.say("\n  The fault log\n")
        self.show.say(f"  {'epoch':>5}  {'sample':>6}  {'kind':9}  {'action':11}  {'file':22}  message")
        for r in records:
            if r.epoch == 0:
                path = None if r.index is None else self.material.train.paths[r.index]
                name = path.name if path else ""
                message = (r.message.splitlines() or [""])[0].removeprefix(f"{path}: ")
                self.show.say(f"  {r.epoch:>5}  {r.index!s:>6}  {r.kind:9}  {r.action:11}  {name:22}  {message[:80]}")
        for epoch in range(1, self.epochs):
            counts = Counter(f"{record.kind} {record.action}" for record in records if record.epoch == epoch)
            self.show.say(f"  {epoch:>5}  " + ", ".join(f"{count} {what}" for what, count in counts.items()))

    def show_quarantine(self) -> dict[str, Any]:
        """Two runs that share a quarantine file: the first fills it, the second asks for none of what it lists."""
        self.show.heading("4  A second run that knows the bad files")
        self.show.say('    faults=FaultPolicy(quarantine="quarantine.jsonl")\n')
        path = self.folder / "quarantine.jsonl"
        runs = []
        for name in ("first run", "second run"):
            loader = make_loader(
                RobustDataLoader, self.material.train, self.workers, faults=FaultPolicy(quarantine=path)
            )
            book = Book()
            with self.show.bar(name, len(loader)) as bar:
                batches = iter(loader)
                for _, _, indices in batches:
                    book.enter(batches.batch_info, indices.tolist())
                    self.pids.update(worker_pids())
                    bar(1)
            summary = loader.summary()
            opened = sum(r.action not in ("quarantined", "retried") for r in loader.fault_log)
            runs.append({"name": name, "deaths": summary.crashes, "failed": opened, "replaced": len(book.replaced)})
            self.show.say(
                f"  {name}: {summary.crashes} workers died, {opened} samples failed, {len(book.replaced)} replaced"
            )
            lost = Counter(wanted for wanted, _ in book.replaced)
            self.claim(
                f"{name} with a quarantine file: every bad sample is replaced", lost == Counter(self.material.lost)
            )
            del batches, loader
        second = runs[-1]
        self.claim(
            "the second run asks for no bad sample, and loses no worker",
            second["failed"] == 0 and second["deaths"] == 0,
        )
        return {"entries": len(path.read_text(encoding="utf-8").splitlines()), "runs": runs}


class Trainer:
    """A small network and the training loop, which is the same for every loader."""

    def __init__(self, epochs: int, batches: int) -> None:
        torch.manual_seed(SEED)
        torch.set_num_threads(1)  # so small a network gains nothing by more, and the workers want the cores
        self.model = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(32 * 6 * 6, 10)),
        )
        self.optimiser = torch.optim.Adam(self.model.parameters())
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimiser, 5e-3, total_steps=epochs * batches)

    def train_epoch(self, batches: Iterator[Any], watch: Watch) -> None:
        """The loop."""
        self.model.train()
        for images, digits, indices in batches:
            loss = nn.functional.cross_entropy(self.model(images), digits)
            self.optimiser.zero_grad()
            loss.backward()
            self.optimiser.step()
            self.schedule.step()
            watch(batches, indices, loss.item())

    @torch.no_grad()
    def test(self, batches: Iterator[Any]) -> float:
        """The share of images classified rightly."""
        self.model.eval()
        hits = torch.cat([self.model(images).argmax(1) == digits for images, digits, _ in batches])
        return hits.double().mean().item()


class Killer:
    """Kills worker 0 after a given number of batches, once, as an operator or the kernel might."""

    def __init__(self, after: int | None) -> None:
        self.left = after
        self.pid: int | None = None

    def __call__(self, batches: Any, indices: torch.Tensor, loss: float) -> None:
        """Count a batch."""
        if self.left is None:
            return
        self.left -= 1
        if self.left <= 0:
            self.left = None
            self.pid = worker_pids()[0]
            os.kill(self.pid, signal.SIGKILL)


@dataclass
class Book:
    """What one epoch delivered, by the samples' own account and by the loader's."""

    delivered: list[int] = field(default_factory=list)
    replaced: list[tuple[int, int]] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    mistakes: list[str] = field(default_factory=list)

    def enter(self, info: Any, contents: list[int]) -> None:
        """Enter one batch: ``info`` is its BatchInfo, ``contents`` the indices that its samples carry."""
        self.sizes.append(len(contents))
        self.replaced.extend(info.replaced.values())
        self.delivered.extend(index for at, index in enumerate(contents) if at not in info.replaced)
        used = all(contents[at] == used for at, (_, used) in info.replaced.items())
        if contents != list(info.indices) or not used:
            self.mistakes.append(f"batch {info.index} holds {contents}, but its batch_info says {info.indices}")


def worker_pids() -> list[int]:
    """Process ids of the worker processes that live now, whichever loader owns them."""
    return [process.pid for process in active_children() if process.pid is not None]


def make_loader(kind: type[Any], dataset: DigitFiles, workers: int, *, shuffle: bool = True, **options: Any) -> Any:
    """A loader of either kind, with the same arguments."""
    return kind(
        dataset,
        batch_size=BATCH,
        shuffle=shuffle,
        num_workers=workers,
        persistent_workers=True,
        generator=torch.Generator().manual_seed(SEED),
        **options,
    )


class Show:
    """Text on standard output, a progress bar on a terminal; nothing on standard output when ``quiet``."""

    def __init__(self, *, quiet: bool) -> None:
        from tqdm import tqdm

        self.quiet = quiet
        self.tqdm = tqdm

    def say(self, text: str) -> None:
        """Print, unless a machine reads."""
        if not self.quiet:
            with self.tqdm.external_write_mode(file=sys.stdout):
                tell(text)

    def warn(self, message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        """Print a warning in one line; fits ``warnings.showwarning``."""
        self.say(f"  {category.__name__}: {message}")

    def heading(self, text: str) -> None:
        """Begin a chapter."""
        self.say(f"\n{text}\n{'-' * len(text)}")

    @contextmanager
    def bar(self, name: str, total: int) -> Iterator[Callable[..., None]]:
        """A progress bar: call it with a count, and a note if there is one. Off a terminal, four lines in its place."""
        with self.tqdm(
            desc=f"  {name}", total=total, leave=False, disable=not sys.stderr.isatty(), dynamic_ncols=True
        ) as bar:
            done = 0

            def step(count: int, note: str = "") -> None:
                nonlocal done
                before, done = done, done + count
                if note:
                    bar.set_postfix_str(note, refresh=False)
                bar.update(count)
                if bar.disable and done * 4 // total > before * 4 // total:
                    self.say(f"  {name}: {done} of {total}" + (f", {note}" if note else ""))

            yield step


def _essence(error: BaseException) -> str:
    """The first and the last line of what an error says, and its cause's."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    text = f"{type(error).__name__}: {lines[0]}" + (f"\n{lines[-1]}" if len(lines) > 1 else "")
    return text if error.__cause__ is None else f"{text}\nfrom {_essence(error.__cause__)}"


def _describe(material: Material, folder: Path) -> str:
    train, paths = material.train, material.train.paths
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(material.damaged.values()).items())
    return f"""\
  {len(train):,} training and {len(material.test)} test images as JPEG files in {folder}
  {len(material.damaged)} training files are damaged ({len(material.damaged) / len(train):.1%}): {kinds}
  {paths[material.crashing].name} makes the process that decodes it crash
  {paths[material.hiccuping].name} fails twice, then loads"""


@contextmanager
def _folder(path: Path | None) -> Iterator[Path]:
    if path is None:
        with tempfile.TemporaryDirectory(prefix="robustloader-demo-") as name:
            yield Path(name)
    else:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CommandError(f"cannot make the folder {path}: {error.strerror}") from error
        yield path


@contextmanager
def _stderr_into(path: Path) -> Iterator[None]:
    """Append what this process and its children write to standard error to a file."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with path.open("ab") as file:
            os.dup2(file.fileno(), 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)


def _whole(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.strip().isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"must be a whole number from {low} to {high}, but got {text!r}")
        return int(text)

    return parse


def _new_folder(text: str) -> Path:
    path = Path(text).absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise argparse.ArgumentTypeError(f"must be a new or an empty folder, but {text!r} is neither")
    return path
