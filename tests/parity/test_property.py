"""Whatever the arguments, nothing that a trainer can notice differs from torch's loader."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, RandomSampler, Subset

from tests.support import parity_data as data
from tests.support.parity_run import MODES, Program, assert_same


@dataclass(frozen=True)
class Case:
    """One way to use a loader."""

    style: str
    kind: str
    size: int
    batch_size: int | None
    drop_last: bool
    order: str
    generator: bool
    num_workers: int
    prefetch_factor: int | None
    persistent: bool
    in_order: bool
    collate: str
    init: str
    augment: bool
    place: bool
    epochs: tuple[int | None, ...]
    ask_length: bool

    @property
    def iterable(self) -> bool:
        return self.style.startswith("stream")

    @property
    def ordered(self) -> bool:
        return self.in_order or self.num_workers < 2

    def dataset(self) -> Any:
        options = {"augment": self.augment, "place": self.place}
        if self.iterable:
            _, shard, sized = self.style.split()
            stream = data.SizedStream if sized == "sized" else data.Stream
            return stream(self.kind, self.size, shard=shard, **options)
        if self.style == "subset":
            return Subset(data.Samples(self.kind, self.size + 3, **options), range(2, self.size + 2))
        return (data.SamplesAtOnce if self.style == "at once" else data.Samples)(self.kind, self.size, **options)

    def arguments(self) -> dict[str, Any]:
        dataset = self.dataset()
        arguments: dict[str, Any] = {"dataset": dataset, "num_workers": self.num_workers, "in_order": self.in_order}
        generator = torch.Generator().manual_seed(77) if self.generator else None
        if generator is not None:
            arguments["generator"] = generator
        if self.num_workers:
            arguments["prefetch_factor"] = self.prefetch_factor
            arguments["persistent_workers"] = self.persistent
            arguments["worker_init_fn"] = {"none": None, "shard": data.shard_in_init, "reseed": data.reseed_in_init}[
                self.init
            ]
        if self.collate != "default":
            arguments["collate_fn"] = {"identity": data.identity, "random": data.random_collate}[self.collate]
        if not self.order.startswith("batch"):
            arguments["batch_size"] = self.batch_size
            if self.batch_size is not None:
                arguments["drop_last"] = self.drop_last
        match self.order:
            case "shuffle":
                arguments["shuffle"] = True
            case "list":
                arguments["sampler"] = list(range(self.size))[::-2]
            case "lazy":
                arguments["sampler"] = data.LazySampler(self.size, 2 * self.size)
            case "eager":
                arguments["sampler"] = data.EagerSampler(self.size, generator)
            case "batch list":
                arguments["batch_sampler"] = [[i, (2 * i) % self.size] for i in range(self.size)]
            case "batch eager":
                arguments["batch_sampler"] = data.EagerBatches(self.size, generator)
            case "batch random":
                arguments["batch_sampler"] = BatchSampler(
                    RandomSampler(dataset, generator=generator), 3, self.drop_last
                )
        return arguments


MAP_ORDERS = ("plain", "shuffle", "list", "lazy", "eager", "batch list", "batch eager", "batch random")
STREAMS = tuple(f"stream {shard} {sized}" for shard in ("info", "init", "none") for sized in ("sized", "open"))


@st.composite
def cases(draw: st.DrawFn, *, workers: st.SearchStrategy[int]) -> Case:
    num_workers = draw(workers)
    style = draw(st.sampled_from(["map", "map", "map", "at once", "subset", *STREAMS[:4], *STREAMS[4:]]))
    iterable = style.startswith("stream")
    size = draw(st.one_of(st.integers(1, 40), st.integers(0, 4)))
    order = draw(st.sampled_from(MAP_ORDERS)) if not iterable and size else "plain"
    batch_size = draw(st.one_of(st.integers(1, 7), st.none()))
    batched = batch_size is not None or order.startswith("batch")
    collate = draw(st.sampled_from(["default", "default", "identity", "random"]))
    kinds = data.COLLATABLE if batched and collate == "default" else data.ANY_KIND
    in_order = draw(st.booleans()) or draw(st.booleans())
    persistent = bool(num_workers) and draw(st.booleans())
    epochs = draw(st.lists(st.one_of(st.none(), st.none(), st.integers(0, 4)), min_size=1, max_size=3))
    if not in_order and num_workers > 1:
        # Who loads what depends on who is first; so does what an abandoned epoch has given.
        epochs = [None] * len(epochs)
    loose = num_workers > 1 and not in_order and not iterable
    # When a shard's end is heard of decides how much of the next epoch's stream is spent on stale tasks.
    late_news = iterable and persistent and num_workers > 1 and len(epochs) > 1
    return Case(
        style=style,
        kind=draw(st.sampled_from(kinds)),
        size=size,
        batch_size=batch_size,
        drop_last=batch_size is not None and draw(st.booleans()),
        order=order,
        generator=draw(st.booleans()),
        num_workers=num_workers,
        prefetch_factor=draw(st.sampled_from([None, 1, 2, 3])),
        persistent=persistent,
        in_order=in_order,
        collate="identity" if collate == "random" and (loose or late_news) else collate,
        init="shard" if style.startswith("stream init") else draw(st.sampled_from(["none", "none", "reseed"])),
        augment=draw(st.booleans()) and not loose and not late_news,
        place=draw(st.booleans()) and not loose,
        epochs=tuple(epochs),
        ask_length=draw(st.booleans()),
    )


def check(case: Case, mode: str) -> None:
    program = Program(case.arguments, epochs=case.epochs, ask_length=case.ask_length)
    assert_same(program, mode, ordered=case.ordered)


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases(workers=st.just(0)))
def test_in_the_training_process(mode: str, case: Case) -> None:
    """With num_workers=0: same batches, lengths, random streams, warnings and exceptions."""
    check(case, mode)


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=70, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases(workers=st.integers(1, 3)))
def test_with_workers(mode: str, case: Case) -> None:
    """With worker processes: the same, worker seeds and get_worker_info() included."""
    check(case, mode)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", data.COLLATABLE)
def test_every_kind_of_sample_is_collated_alike(kind: str, num_workers: int) -> None:
    """Containers, dtypes, strides and values of a default-collated batch are torch's."""
    assert_same(
        Program(lambda: {"dataset": data.Samples(kind, 7), "batch_size": 3, "num_workers": num_workers}), "defaults"
    )


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", data.ANY_KIND)
def test_every_kind_of_sample_crosses_uncollated(kind: str, num_workers: int) -> None:
    """Without batching, and with a collate_fn that leaves samples alone, they arrive as they were."""
    dataset = data.Samples(kind, 5)
    assert_same(Program(lambda: {"dataset": dataset, "batch_size": None, "num_workers": num_workers}), "defaults")
    assert_same(
        Program(lambda: {"dataset": dataset, "batch_size": 2, "collate_fn": data.identity, "num_workers": num_workers}),
        "defaults",
    )


@pytest.mark.parametrize("style", STREAMS[:4])
@pytest.mark.parametrize(("mode", "persistent"), [("strict", True), ("defaults", False)])
def test_streams_over_three_epochs(mode: str, style: str, persistent: bool) -> None:
    """Each shard is one worker's, in torch's order of delivery, also when shards end at different times."""
    case = Case(
        style=style,
        kind="dict",
        size=19,
        batch_size=2,
        drop_last=False,
        order="plain",
        generator=True,
        num_workers=3,
        prefetch_factor=2,
        persistent=persistent,
        in_order=True,
        collate="default",
        init="shard",
        augment=not persistent,
        place=True,
        epochs=(None, 3, None),
        ask_length=True,
    )
    check(case, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("style", ["map", "stream info sized", "stream init open"])
def test_out_of_order(mode: str, style: str) -> None:
    """With in_order=False the same batches come, in whatever order they are ready."""
    case = Case(
        style=style,
        kind="list",
        size=23,
        batch_size=2,
        drop_last=False,
        order="plain",
        generator=False,
        num_workers=3,
        prefetch_factor=2,
        persistent=True,
        in_order=False,
        collate="default",
        init="shard",
        augment=False,
        place=style != "map",
        epochs=(None, None),
        ask_length=False,
    )
    check(case, mode)
