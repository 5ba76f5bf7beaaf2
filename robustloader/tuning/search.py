"""``tune()``: how many workers, measured on the user's own dataset."""

from __future__ import annotations

import contextlib
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from robustloader.decisions.tuning import Block, Ceiling, Explorer, Model, advise, plan_ceiling, plan_grid, tell_trouble
from robustloader.errors import OptionError
from robustloader.policies import MemoryPolicy, check_number
from robustloader.system import limits
from robustloader.tuning.measure import Probe, Workbench
from robustloader.tuning.report import TuningReport
from robustloader.worker.seeding import preserve_rng

__all__ = ["Bench", "search", "tune"]

ROUNDS = 4
"""A block's length is such that so many rounds of the first candidates fit into the time."""

LEAST_BLOCK_S = 0.1


class Bench(Protocol):
    """What the search asks measurements of; :class:`Workbench`, or a fake one in tests."""

    why_no_copy: str
    notes: list[str]

    def probe(self, seconds: float) -> Probe:
        """Load some batches in one process, and let one cross."""

    def measure(self, workers: int, seconds: float, goes_on: Callable[[], bool] = ...) -> Block | None:
        """One turn of a candidate."""


def tune(
    dataset: Any,
    *,
    batch_size: int | None,
    candidates: Iterable[int] | None = None,
    seconds: float = 20,
    step_s: float = 0.0,
    progress: bool = True,
    **loader_kwargs: Any,
) -> TuningReport:
    """Measure how many workers a dataset needs here, and recommend the fewest that suffice.

    One process loads some batches, one batch crosses from a worker, and a model made of that says where to begin. Then
    candidates have their turns in rounds, each with a fresh loader and a warm-up that is not counted, until the answer
    stands or the time is up. Ctrl-C ends it early, with the result so far.

    Nothing of the caller's is used up: a ``sampler``, ``generator`` or ``shuffle`` among the arguments only says that
    the order is random (it is drawn elsewhere), Python's, NumPy's and torch's global random states are restored, and
    what is loaded in this process is loaded by a copy of the dataset (its tensors and arrays are shared).

    *Runs in* the training process, which starts worker processes and ends them.

    Args:
        dataset: map-style or iterable.
        batch_size: as for the loader; None for a dataset that makes its own batches. At most an epoch is measured.
        candidates: numbers of workers to measure, those within the limits of this machine; None chooses among these.
        seconds: how long it may take, about; a dataset with slow batches takes longer.
        step_s: what the trainer does with a batch, in seconds; 0 takes batches as fast as they come.
        progress: show how far it is on stderr (a bar where tqdm is installed).
        loader_kwargs: further arguments of the loader: ``collate_fn``, ``pin_memory``, ``prefetch_factor``,
            ``multiprocessing_context`` ...

    Raises:
        OptionError: an argument is wrong.
        ValueError: the dataset is empty, or no candidate could be measured.
        Exception: whatever the dataset raises, where it cannot be recovered from.
    """
    check_number("batch_size", batch_size, low=1, whole=True, optional=True)
    check_number("seconds", seconds, above=True)
    check_number("step_s", step_s)
    for name in ("num_workers", "batch_sampler"):
        if loader_kwargs.get(name) is not None:
            raise OptionError(name, loader_kwargs[name], "left out: tune() chooses num_workers and takes batch_size")
    check_number("prefetch_factor", loader_kwargs.get("prefetch_factor"), low=1, whole=True, optional=True)
    chosen = None if candidates is None else _check_candidates(candidates)
    with preserve_rng(), warnings.catch_warnings():
        # More workers than processors are measured only where samples mostly wait, or where the caller asks for them.
        warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
        bench = Workbench(dataset, batch_size=batch_size, step_s=step_s, loader_kwargs=loader_kwargs)
        return search(
            bench,
            batch_size=bench.batch_size,
            candidates=chosen,
            seconds=seconds,
            step_s=step_s,
            prefetch_factor=loader_kwargs.get("prefetch_factor") or 2,
            show=_progress(seconds) if progress else None,
        )


def _check_candidates(candidates: Iterable[int]) -> tuple[int, ...]:
    """Ascending, each once."""
    if not isinstance(candidates, Iterable):
        raise OptionError("candidates", candidates, "numbers of workers, such as (0, 2, 4), or None")
    numbers = tuple(candidates)
    for number in numbers:
        check_number("candidates", number, whole=True)
    if not numbers:
        raise OptionError("candidates", candidates, "at least one number of workers, or None")
    return tuple(sorted(set(numbers)))


def search(
    bench: Bench,
    *,
    batch_size: int | None,
    candidates: tuple[int, ...] | None,
    seconds: float,
    step_s: float,
    prefetch_factor: int,
    show: Callable[[], contextlib.AbstractContextManager[Callable[[str], None]]] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> TuningReport:
    """Ask ``bench`` for measurements until the answer stands, the time is up, or Ctrl-C.

    Raises:
        ValueError: nothing could be measured.
        KeyboardInterrupt: before there was anything to report.
    """
    deadline = clock() + seconds
    with show() if show else contextlib.nullcontext(_silent) as tell:
        tell("one process")
        probe = bench.probe(min(2.0, seconds / 10))
        cpus, ranks = limits.usable_cpus(), limits.local_world_size()
        share = max(1, cpus // ranks)
        model = Model(load_s=probe.load_s, cpu_s=probe.cpu_s, cross_s=probe.cross_s, cpus=share, step_s=step_s)
        ceiling = _ceiling(probe, cpus, ranks, prefetch_factor, worker_bytes=0)
        notes = list(bench.notes)
        grid = candidates or plan_grid(ceiling.workers)
        if not probe.in_process:
            notes.append(
                "loading in the training process (num_workers=0) was not measured, since the dataset cannot be copied, "
                f"and the original is not to be touched ({bench.why_no_copy})"
            )
            grid = tuple(number for number in grid if number)
        allowed = tuple(number for number in grid if number <= ceiling.workers)
        if allowed != grid or not (allowed or candidates):
            top = "1 worker was" if ceiling.workers == 1 else f"{ceiling.workers} workers were"
            notes.append(f"more than {top} left out: {ceiling.reason}")
        if not allowed:
            raise _nothing_measured(notes)
        explorer = Explorer(allowed, None if candidates else model)
        first = len(allowed) if candidates else min(4, len(allowed))
        block_s = max(LEAST_BLOCK_S, 0.6 * (deadline - clock()) / (ROUNDS * first), 4 * model.batch_s(max(allowed)))
        complete, largest = True, 0
        try:
            while (workers := explorer.next()) is not None:
                if clock() >= deadline and explorer.blocks:
                    complete = not explorer.pending
                    break
                tell(f"num_workers={workers}")
                block = bench.measure(workers, block_s, lambda: clock() < deadline)
                if block is None:
                    explorer.drop(workers)
                    notes.append(f"num_workers={workers} could not be measured: the dataset ends in the warm-up")
                    continue
                explorer.record(workers, block)
                if block.worker_bytes > largest:
                    largest = block.worker_bytes
                    ceiling = _ceiling(probe, cpus, ranks, prefetch_factor, worker_bytes=largest)
                    explorer.limit(ceiling.workers)
        except KeyboardInterrupt:
            if not explorer.blocks:
                raise
            complete = False
    if not explorer.blocks:
        raise _nothing_measured(notes)
    expected = model.knee(explorer.grid) if explorer.grid and not complete else None
    untried = expected if expected not in explorer.blocks else None
    found = advise(explorer.blocks, model=model, step_s=step_s, ceiling=ceiling, untried=untried)
    return TuningReport(
        best=found.best,
        rows=found.rows,
        verdict=found.verdict,
        reason=found.reason,
        complete=complete,
        batch_size=batch_size,
        step_s=step_s,
        load_s=probe.load_s,
        cpu_s=probe.cpu_s,
        cross_s=probe.cross_s,
        batch_bytes=probe.batch_bytes,
        ceiling=ceiling.workers,
        ceiling_reason=ceiling.reason,
        notes=(*notes, *tell_trouble(explorer.blocks)),
    )


def _nothing_measured(notes: list[str]) -> ValueError:
    return ValueError("nothing was measured: " + "; ".join(notes))


def _ceiling(probe: Probe, cpus: int, ranks: int, prefetch_factor: int, *, worker_bytes: int) -> Ceiling:
    return plan_ceiling(
        cpus=cpus,
        ranks=ranks,
        load_s=probe.load_s,
        cpu_s=probe.cpu_s,
        memory=limits.read_memory(),
        headroom_fraction=MemoryPolicy().headroom_fraction,
        batch_bytes=probe.batch_bytes,
        worker_bytes=worker_bytes,
        prefetch_factor=prefetch_factor,
        descriptors=limits.open_descriptors(),
        processes=limits.read_processes(),
    )


# --- progress ---------------------------------------------------------------------------------------------------------


def _silent(text: str) -> None:
    return None


def _progress(seconds: float) -> Callable[[], contextlib.AbstractContextManager[Callable[[str], None]]]:
    """A bar of tqdm's, or a line per turn on stderr."""

    @contextlib.contextmanager
    def show() -> Iterator[Callable[[str], None]]:
        begun = time.monotonic()
        try:
            import tqdm
        except ImportError:
            yield lambda text: print(f"tune: {time.monotonic() - begun:4.1f} s  {text}", file=sys.stderr, flush=True)
            return
        layout = "{desc} {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s"

        class Bar(tqdm.tqdm):  # type: ignore[type-arg]
            monitor_interval = 0  # no thread of tqdm's is left behind in a process that may fork

        with Bar(total=seconds, desc="tune", file=sys.stderr, leave=False, bar_format=layout) as bar:

            def tell(text: str) -> None:
                bar.n = min(seconds, time.monotonic() - begun)
                bar.set_description(f"tune: {text}")

            yield tell

    return show
