"""What reaches a CUDA device, and how long does the device wait for it?

Question: with ``pin_memory=True``, how fast do batches get from the dataset to the device through torch's loader and
    through this one, does pinning pay, and which share of a real training run is the device idle?
Method: (copies) each workload's batches are sent off with ``non_blocking=True`` as they come and dropped; a block ends
    when the device has them all. One batch that is pinned already, sent again and again, is the limit of the bus.
    (pinning) the same through this loader alone, with ``pin_memory`` and without.
    (training) a ResNet-18 trains on decoded JPEG files with SGD, its kernels launched one by one. How long the device
    works for a step is measured once, from a graph whose kernels run back to back; for the rest of a block's time it
    is idle. The same batch again and again, on the device already, is what the model alone could do. Both loaders live
    at once, and blocks of them take turns, in an order that changes; ratios compare blocks of one round.
Trap: events around each step would call the device busy while it waits for a process that has no processor to launch
    the next kernel, which is what many workers bring about. Where the workers' processors are the bottleneck, no loader
    can keep the device busy: ``images_per_s`` beside the model's own rate says so. Memory is pinned afresh until the
    allocator's cache is warm: a block's first batches are not counted.
Rerun: ``make bench-cuda``, on a machine with a CUDA device; ``--device cpu`` only shows that the program works.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks import machine
from benchmarks.harness import chosen, close, note, turn_order, wait_until_quiet
from benchmarks.stats import paired_ratio, spread
from benchmarks.tables import publish
from benchmarks.workloads import WORKLOADS, Workload
from robustloader import RobustDataLoader

__all__ = ["ResNet", "render", "run"]

BEGIN = "<!-- cuda: begin -->"
END = "<!-- cuda: end -->"

NAMES = ("tiny", "tokens", "image-u8", "image-f32", "jpeg")
LOADERS: dict[str, Callable[..., Any]] = {
    "robustloader": functools.partial(RobustDataLoader, pin_memory=True),
    "torch": functools.partial(DataLoader, pin_memory=True),
}
PINNED: dict[str, Callable[..., Any]] = {"pinned": LOADERS["robustloader"], "pageable": RobustDataLoader}
LIMIT = "limit"
PARTS = ("copies", "pinning", "training")
ENDLESS = 1 << 30
"""Samples of a dataset that no block comes to the end of."""


@dataclass(frozen=True)
class Form:
    """How much is measured."""

    rounds: int
    block_s: float
    workers: int
    image_batch: int


# --- the model


class Block(nn.Module):
    """Two 3×3 convolutions beside a shortcut, as in He and others, https://arxiv.org/abs/1512.03385, figure 2."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.path = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(inplace=True),
            nn.Conv2d(after, after, 3, 1, 1, bias=False),
            nn.BatchNorm2d(after),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, images: Tensor) -> Tensor:
        """[N, before, H, W] to [N, after, H / stride, W / stride]."""
        return torch.relu(self.path(images) + self.shortcut(images))


class ResNet(nn.Sequential):
    """ResNet-18 (table 1 of the paper), for so many classes: [N, 3, H, W] to [N, classes]; ``width`` is 64 there."""

    def __init__(self, classes: int = 10, width: int = 64) -> None:
        widths = [width, *(width << stage for stage in range(4))]
        blocks = []
        for stage, (before, after) in enumerate(itertools.pairwise(widths)):
            blocks += [Block(before, after, 2 if stage else 1), Block(after, after, 1)]
        super().__init__(
            nn.Conv2d(3, width, 7, 2, 3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
            *blocks,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(widths[-1], classes),
        )


# --- the device


class Device:
    """The device that is measured; with "cpu" everything works, and nothing means anything."""

    def __init__(self, name: str) -> None:
        self.device = torch.device(name)
        self.real = self.device.type == "cuda"

    def send(self, batch: Any) -> Any:
        """Queue the copies of a batch's tensors."""
        if isinstance(batch, Tensor):
            return batch.to(self.device, non_blocking=True)
        if isinstance(batch, Mapping):
            return {key: self.send(value) for key, value in batch.items()}
        if isinstance(batch, (list, tuple)):
            return [self.send(value) for value in batch]
        return batch

    def wait(self) -> None:
        """Until the device has done all that was queued."""
        if self.real:
            torch.cuda.synchronize(self.device)

    def work_s(self, step: Callable[[], None], times: int = 30) -> float:
        """Seconds of the device's own work in a step: replayed from a graph, its kernels run back to back, however late
        a busy process would launch them one by one."""
        for _ in range(3):
            step()  # what is made once, as momentum and workspaces are, is made before
        self.wait()
        if not self.real:
            begun = time.perf_counter()
            step()
            return time.perf_counter() - begun
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        graph.replay()
        begin.record()
        for _ in range(times):
            graph.replay()
        end.record()
        self.wait()
        return begin.elapsed_time(end) / 1e3 / times

    def describe(self) -> dict[str, Any]:
        """Which one it is."""
        if not self.real:
            return {"name": "none: this result shows that the program works, and measures nothing"}
        facts = torch.cuda.get_device_properties(self.device)
        return {
            "name": facts.name,
            "memory_gib": round(facts.total_memory / 2**30, 1),
            "capability": f"{facts.major}.{facts.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }


# --- entrants


@dataclass
class Entrant:
    """Batches under way from one loader, or the same one again and again."""

    name: str
    batches: Iterator[Any]
    lookahead: int
    count: int = 0
    rows: list[dict[str, float]] = field(default_factory=list)


def size_of(batch: Any) -> int:
    """Bytes of a batch's tensors."""
    if isinstance(batch, Tensor):
        return batch.nbytes
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    return sum(size_of(value) for value in values)


def pin(batch: Any) -> Any:
    """A pinned copy, where there is a device."""
    if isinstance(batch, Tensor):
        return batch.pin_memory()
    if isinstance(batch, Mapping):
        return {key: pin(value) for key, value in batch.items()}
    return [pin(value) for value in batch] if isinstance(batch, (list, tuple)) else batch


def enter(
    stack: contextlib.ExitStack,
    loaders: Mapping[str, Callable[..., Any]],
    dataset: Dataset[Any],
    workload: Workload,
    batch_size: int,
    form: Form,
) -> list[Entrant]:
    """All loaders with an iterator under way; the stack ends them."""
    entrants = []
    for name, kind in loaders.items():
        loader = kind(
            dataset,
            batch_size=batch_size,
            num_workers=form.workers,
            collate_fn=workload.collate,
            multiprocessing_context="fork",
        )
        iterator = iter(loader)
        stack.callback(close, iterator)
        entrants.append(Entrant(name, iterator, 2 * form.workers))
    return entrants


def measure_rounds(entrants: list[Entrant], block: Callable[[Entrant, int], dict[str, float]], form: Form) -> None:
    """Blocks in turn. How many batches a block has is found out once for each, from as many as all workers have in
    hand: they come in bursts, and a few of one burst seem to cost nothing."""
    for entrant in entrants:
        block(entrant, entrant.lookahead + 2)
        took_s = block(entrant, max(4, entrant.lookahead))["batch_s"]
        entrant.count = max(8, min(2000, round(form.block_s / max(took_s, 1e-6))))
    for number in range(form.rounds):
        for entrant in turn_order(entrants, number):
            wait_until_quiet()
            block(entrant, entrant.lookahead + 1)  # what lay ready while the others ran is not counted
            entrant.rows.append(block(entrant, entrant.count))


def told(entrants: Sequence[Entrant]) -> dict[str, dict[str, list[float]]]:
    """Entrant → quantity → its values, round by round."""
    return {
        entrant.name: {name: [row[name] for row in entrant.rows] for name in entrant.rows[0]} for entrant in entrants
    }


# --- copies


def measure_copies(
    workload: Workload,
    device: Device,
    form: Form,
    folder: Path,
    loaders: Mapping[str, Callable[..., Any]],
    *,
    limit: bool,
) -> dict[str, Any]:
    """Milliseconds a batch from the dataset to the device, and bytes per second; ``limit``: of the bus alone, too."""
    dataset = workload.dataset(ENDLESS, folder)
    sample = workload.collate_fn([dataset[index] for index in range(workload.batch_size)])
    nbytes = size_of(sample)

    def block(entrant: Entrant, count: int) -> dict[str, float]:
        begun = time.perf_counter()
        for batch in itertools.islice(entrant.batches, count):
            device.send(batch)
        device.wait()
        batch_s = (time.perf_counter() - begun) / count
        return {"batch_s": batch_s, "bytes_per_s": nbytes / batch_s}

    with contextlib.ExitStack() as stack:
        entrants = enter(stack, loaders, dataset, workload, workload.batch_size, form)
        if limit:
            entrants.append(Entrant(LIMIT, itertools.repeat(pin(sample) if device.real else sample), 0))
        measure_rounds(entrants, block, form)
        return {"batch_bytes": nbytes, "rounds": told(entrants)}


# --- training


def measure_training(device: Device, form: Form, folder: Path) -> dict[str, Any]:
    """A ResNet-18 on decoded JPEG files: images a second, and the share of the time in which the device is idle."""
    workload = WORKLOADS["jpeg"]
    dataset = workload.dataset(ENDLESS, folder)
    torch.manual_seed(0)
    model = ResNet(width=64 if device.real else 4).to(device.device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    loss_of = nn.CrossEntropyLoss()

    def step(images: Tensor, labels: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.device.type, dtype=torch.bfloat16, enabled=device.real, cache_enabled=False):
            loss = loss_of(model(images.contiguous(memory_format=torch.channels_last)), labels)
        loss.backward()
        optimizer.step()

    samples = [dataset[index] for index in range(form.image_batch)]
    there = device.send(workload.collate_fn(samples))
    work_s = device.work_s(lambda: step(*there))

    def block(entrant: Entrant, count: int) -> dict[str, float]:
        device.wait()
        begun = time.perf_counter()
        for batch in itertools.islice(entrant.batches, count):
            step(*device.send(batch))
        device.wait()
        batch_s = (time.perf_counter() - begun) / count
        return {
            "batch_s": batch_s,
            "images_per_s": form.image_batch / batch_s,
            "idle_share": max(0.0, 1 - work_s / batch_s),
        }

    with contextlib.ExitStack() as stack:
        entrants = enter(stack, LOADERS, dataset, workload, form.image_batch, form)
        entrants.append(Entrant(LIMIT, itertools.repeat(there), 0))
        measure_rounds(entrants, block, form)
        return {"batch_size": form.image_batch, "work_s": work_s, "rounds": told(entrants)}


# --- the result


def run(
    device: Device,
    form: Form,
    names: Sequence[str] = NAMES,
    parts: Sequence[str] = PARTS,
    before: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Measure these parts; the others are those of the result before, if there is one."""
    result: dict[str, Any] = {
        **{part: {} for part in PARTS},
        **(before or {}),
        **machine.describe(),
        "device": device.describe(),
        "date": datetime.now(UTC).date().isoformat(),
        "form": {"rounds": form.rounds, "block_s": form.block_s, "workers": form.workers},
    }
    with tempfile.TemporaryDirectory(prefix="robustloader-cuda-") as folder:
        for part, loaders in (("copies", LOADERS), ("pinning", PINNED)):
            for name in names if part in parts else ():
                note(f"{part}: {name}")
                result[part][name] = measure_copies(
                    WORKLOADS[name], device, form, Path(folder), loaders, limit=part == "copies"
                )
        if "training" in parts:
            note("training: ResNet-18 on JPEG files")
            result["training"] = measure_training(device, form, Path(folder))
    return result


def render(result: Mapping[str, Any]) -> str:
    """The result as Markdown."""
    device, versions, commit = result["device"], result["versions"], result["commit"]
    cpu, form = result["machine"], result["form"]
    lines = [
        f"{device['name']} (CUDA {device.get('cuda')}), {cpu['cpu']}, {cpu['usable_cores']} cores, "
        f"{form['workers']} workers; python {versions['python']}, torch {versions['torch']}; commit "
        f"`{str(commit['hash'])[:10]}`, {result['date']}.",
        "",
        "From the dataset to the device, with `pin_memory=True`: medians of the rounds, and how many times as long "
        "torch takes, with the 95 % interval of the median.",
        "",
        "| workload | robustloader, ms | torch, ms | bus alone, ms | robustloader, GB/s | torch / robustloader |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, measured in result["copies"].items():
        rounds = measured["rounds"]
        ms = {who: spread(values["batch_s"]).median * 1e3 for who, values in rounds.items()}
        rate = spread(rounds["robustloader"]["bytes_per_s"]).median / 1e9
        ratio = paired_ratio(rounds["torch"]["batch_s"], rounds["robustloader"]["batch_s"])
        lines.append(
            f"| `{name}` | {ms['robustloader']:.3g} | {ms['torch']:.3g} | {ms[LIMIT]:.3g} | {rate:.3g} "
            f"| {ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f}) |"
        )
    if result["pinning"]:
        lines += [
            "",
            "Through robustloader with `pin_memory=True` and without, and how many times as long it takes without:",
            "",
            "| workload | MB | pinned, ms | pageable, ms | pageable / pinned |",
            "|---|--:|--:|--:|--:|",
        ]
    for name, measured in result["pinning"].items():
        batch_s = [measured["rounds"][who]["batch_s"] for who in PINNED]
        ms = [spread(values).median * 1e3 for values in batch_s]
        ratio = paired_ratio(batch_s[1], batch_s[0])
        lines.append(
            f"| `{name}` | {measured['batch_bytes'] / 1e6:.3g} | {ms[0]:.3g} | {ms[1]:.3g} "
            f"| {ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f}) |"
        )
    training = result["training"]
    if not training:
        return "\n".join([*lines, ""])
    lines += [
        "",
        f"ResNet-18 on JPEG files that workers decode and augment, {training['batch_size']} images a step, for which "
        f"the device works {training['work_s'] * 1e3:.3g} ms:",
        "",
        "| batches from | images/s | the device is idle |",
        "|---|--:|--:|",
    ]
    for who, values in training["rounds"].items():
        name = "the device itself: the same batch again" if who == LIMIT else who
        rate, idle = spread(values["images_per_s"]).median, spread(values["idle_share"]).median
        lines.append(f"| {name} | {rate:,.0f} | {100 * idle:.1f} % |")
    return "\n".join([*lines, ""])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the result and the page, print the tables; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--short", action="store_true", help="one round of short blocks, to see that it works")
    parser.add_argument("--only", metavar="NAMES", help=f"workloads to copy, some of: {','.join(NAMES)}")
    parser.add_argument(
        "--parts", metavar="NAMES", help=f"measure some of {','.join(PARTS)}; the others stay as they are"
    )
    parser.add_argument("--device", default="cuda", help="the device (default: cuda); cpu measures nothing")
    parser.add_argument("--workers", type=int, help="worker processes (default: one per usable processor, at most 16)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cuda.json"), help="the result file")
    parser.add_argument("--page", type=Path, help="a page to put the tables into, between its markers")
    options = parser.parse_args(arguments)
    names, parts = chosen(parser, options.only, NAMES), chosen(parser, options.parts, PARTS)
    if options.device != "cpu" and not torch.cuda.is_available():
        print("there is no CUDA device: nothing measured", file=sys.stderr)
        return 2
    workers = options.workers or min(16, len(os.sched_getaffinity(0)))
    form = Form(1, 0.2, workers, 1) if options.short else Form(9, 3.0, workers, 64)
    warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
    begun = time.monotonic()
    goes_on = options.parts and options.out.exists()
    before = json.loads(options.out.read_text()) if goes_on else None
    result = run(Device(options.device), form, names, parts, before)
    result["took_s"] = round(time.monotonic() - begun, 1)
    publish(result, render, options.out, options.page, BEGIN, END)
    return 0


if __name__ == "__main__":
    sys.exit(main())
