"""The places where a loader that looks like torch's is not: one test each."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, SubsetRandomSampler, TensorDataset, default_collate

from robustloader import RobustDataLoader
from tests.support import parity_data as data
from tests.support.parity_run import MODES, STRICT, Program, assert_same, fingerprint

both_modes = pytest.mark.parametrize("mode", MODES)


class Counting:
    """A sampler that counts how often it is begun, and how far it is read."""

    def __init__(self, size: int) -> None:
        self.size, self.begun, self.read = size, 0, 0

    def __iter__(self) -> Iterator[int]:
        self.begun += 1
        return self._read()

    def _read(self) -> Iterator[int]:
        for index in range(self.size):
            self.read += 1
            yield index

    def __len__(self) -> int:
        return self.size


# --- the sampler ------------------------------------------------------------------------------------------------------


@both_modes
@pytest.mark.parametrize(("num_workers", "times"), [(0, 1), (1, 2), (2, 2)])
def test_how_often_the_sampler_is_begun(mode: str, num_workers: int, times: int) -> None:
    """torch calls iter() on a sampler twice for an epoch with workers, and once without. (Here batch_size is None: the
    iterator of torch's BatchSampler is a generator, which begins the sampler within it when it is first read.)"""
    for kind, options in ((DataLoader, {}), (RobustDataLoader, MODES[mode])):
        sampler = Counting(6)
        assert len(list(kind(range(6), sampler=sampler, batch_size=None, num_workers=num_workers, **options))) == 6
        assert sampler.begun == times


@both_modes
def test_how_often_the_sampler_is_begun_by_persistent_workers(mode: str) -> None:
    """Once more for each further epoch."""
    for kind, options in ((DataLoader, {}), (RobustDataLoader, MODES[mode])):
        sampler = Counting(6)
        loader = kind(range(6), sampler=sampler, batch_size=None, num_workers=1, persistent_workers=True, **options)
        begun = [len(list(loader)) and sampler.begun for _ in range(3)]
        assert begun == [2, 3, 4]


@both_modes
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("generator", [False, True])
@pytest.mark.parametrize("sampler", ["sampler", "batch_sampler"])
def test_an_eager_sampler_draws_the_same_permutation(
    mode: str, num_workers: int, generator: bool, sampler: str
) -> None:
    """A sampler that shuffles inside iter() shows how often it was asked, and when the base seed was drawn."""

    def arguments() -> dict[str, Any]:
        own = torch.Generator().manual_seed(5) if generator else None
        chosen = data.EagerSampler(9, own) if sampler == "sampler" else data.EagerBatches(9, own)
        return {"dataset": data.Samples("int", 9), "num_workers": num_workers, "generator": own, sampler: chosen}

    assert_same(Program(arguments, epochs=(None, 2, None)), mode)


@both_modes
@pytest.mark.parametrize("num_workers", [1, 2, 3])
@pytest.mark.parametrize("prefetch_factor", [1, 2, 5])
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_the_lookahead_is_exact(mode: str, num_workers: int, prefetch_factor: int) -> None:
    """iter() itself reads prefetch_factor × num_workers entries from the sampler, and each batch one more."""
    reads = []
    for kind, options in ((DataLoader, {}), (RobustDataLoader, MODES[mode])):
        sampler = Counting(40)
        loader = kind(
            range(40),
            sampler=sampler,
            batch_size=None,
            num_workers=num_workers,
            prefetch_factor=prefetch_factor,
            **options,
        )
        iterator = iter(loader)
        progress = [sampler.read]
        for _ in range(40):
            next(iterator)
            progress.append(sampler.read)
        reads.append(progress)
    assert reads[0][0] == prefetch_factor * num_workers
    assert reads[1] == reads[0]


@both_modes
@pytest.mark.parametrize("stop", [1, 3])
def test_stale_tasks_move_the_streams_of_persistent_workers(mode: str, stop: int) -> None:
    """After a break, persistent workers load what was prefetched: their random streams go on from there."""

    def arguments() -> dict[str, Any]:
        return {
            "dataset": data.Samples("int", 12, augment=True),
            "batch_size": 2,
            "num_workers": 2,
            "prefetch_factor": 2,
            "persistent_workers": True,
        }

    torchs = assert_same(Program(arguments, epochs=(stop, None, stop, None)), mode)
    assert len(torchs.batches()) == 2 * (stop + 6)


@both_modes
def test_workers_are_primed_by_iter(mode: str) -> None:
    """The parent's random streams move in iter(), not later: torch draws the base seed there."""
    states = []
    for kind, options in ((DataLoader, {}), (RobustDataLoader, MODES[mode])):
        torch.manual_seed(3)
        iterator = iter(kind(range(4), num_workers=1, shuffle=True, **options))
        states.append([data.random_state()])
        for _ in iterator:
            states[-1].append(data.random_state())
    assert states[0] == states[1]


# --- seeds and whereabouts --------------------------------------------------------------------------------------------


@both_modes
@pytest.mark.parametrize("seed", [0, 1, 2**31, -5])
def test_worker_seeds_follow_the_base_seed(mode: str, seed: int) -> None:
    """Seeds, get_worker_info() and the three random streams of each worker are torch's for any seed."""

    def arguments() -> dict[str, Any]:
        return {"dataset": data.Samples("int", 6), "num_workers": 2, "worker_init_fn": data.reseed_in_init}

    assert_same(Program(arguments, seed=seed % 2**32), mode)
    program = Program(
        lambda: {
            "dataset": data.Samples("int", 6),
            "num_workers": 2,
            "generator": torch.Generator().manual_seed(seed),
            "shuffle": True,
        }
    )
    assert_same(program, mode)


def info_facts(worker_id: int) -> None:
    """A worker_init_fn: what it sees goes to the dataset, which hands it out."""
    info = torch.utils.data.get_worker_info()
    assert info is not None
    facts = (info.id, info.num_workers, info.seed, type(info.dataset).__name__, worker_id)
    info.dataset.facts = (*facts, torch.initial_seed(), torch.get_num_threads(), info.dataset.marker)
    info.dataset.same = info.dataset


class Facts(Dataset[Any]):
    """Hands out what its worker_init_fn saw."""

    marker = "here"
    facts: Any = None
    same: Any = None

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        info = torch.utils.data.get_worker_info()
        return index, self.facts, self.same is self, info is not None and info.dataset is self


@both_modes
def test_get_worker_info_in_worker_init_fn(mode: str) -> None:
    """It holds id, number, seed and the very dataset object that the worker reads; one thread for torch."""
    torchs = assert_same(
        Program(
            lambda: {
                "dataset": Facts(),
                "batch_size": None,
                "num_workers": 2,
                "worker_init_fn": info_facts,
                "collate_fn": data.identity,
            }
        ),
        mode,
    )
    assert "True), ('bool', 'True')" in repr(torchs.batches()[0]).replace("'True'", "True", 1)


@both_modes
def test_there_is_no_worker_info_in_the_training_process(mode: str) -> None:
    """get_worker_info() is None before, during and after loading with workers."""
    assert torch.utils.data.get_worker_info() is None
    for _ in RobustDataLoader(range(3), num_workers=1, **MODES[mode]):
        assert torch.utils.data.get_worker_info() is None
    for info in RobustDataLoader(data.Shared(1, is_no_worker), **MODES[mode]):
        assert bool(info)
    assert torch.utils.data.get_worker_info() is None


def is_no_worker(index: int) -> bool:
    """Whether this is the training process, as far as get_worker_info() tells."""
    return torch.utils.data.get_worker_info() is None


@both_modes
@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_streams_of_the_training_process_are_left_alone(mode: str, num_workers: int) -> None:
    """What the trainer draws between batches is what it would draw with torch's loader."""
    drawn = []
    for kind, options in ((DataLoader, {}), (RobustDataLoader, MODES[mode])):
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        loader = kind(
            data.Samples("int", 6, augment=num_workers == 0), num_workers=num_workers, shuffle=True, **options
        )
        drawn.append([(fingerprint(batch), fingerprint(data.draw())) for batch in loader])
    assert drawn[0] == drawn[1]


# --- collate in a worker ----------------------------------------------------------------------------------------------


def mixed_dtypes(index: int) -> torch.Tensor:
    """Floats of two sizes, turn about."""
    return torch.ones(2, dtype=torch.float32 if index % 2 else torch.float64) * index / 3


def narrow_first(index: int) -> torch.Tensor:
    """The narrow dtype first."""
    return torch.ones(2, dtype=torch.float64 if index % 2 else torch.float16) * index / 3


def ints_then_float(index: int) -> torch.Tensor:
    """An integer first."""
    return torch.tensor(index if index % 2 == 0 else index / 3)


def float_then_ints(index: int) -> torch.Tensor:
    """A float first."""
    return torch.tensor(index if index % 2 else index / 3)


def needs_grad(index: int) -> torch.Tensor:
    """A leaf that requires grad."""
    return torch.ones(2, requires_grad=True)


def sizes_differ(index: int) -> torch.Tensor:
    """Another shape each time."""
    return torch.ones(index + 1)


def dimensions_differ(index: int) -> torch.Tensor:
    """Same size, another number of dimensions."""
    return torch.ones(4) if index % 2 else torch.ones(2, 2)


def lists_differ(index: int) -> list[int]:
    """Lists of two lengths."""
    return [1] * (1 + index % 2)


def unknown_type(index: int) -> Any:
    """Nothing default_collate knows."""
    return object()


def keys_differ(index: int) -> dict[str, int]:
    """Dicts with other keys."""
    return {f"k{index}": index}


def sparse(index: int) -> torch.Tensor:
    """A layout that default_collate refuses."""
    return torch.eye(2).to_sparse()


def strings_in_numpy(index: int) -> Any:
    """An array dtype that default_collate refuses."""
    return np.array(["a", "b"])


def parameter(index: int) -> torch.Tensor:
    """A tensor subclass."""
    return torch.nn.Parameter(torch.ones(2), requires_grad=False)


def complex_numbers(index: int) -> Any:
    """Conjugated views."""
    return torch.tensor([1 + 2j, index]).conj(), torch.tensor([1 + 2j]).conj().imag


def scalars(index: int) -> Any:
    """NumPy scalars and 0-dimensional things, bools and big integers."""
    return np.float16(index), np.bool_(index % 2), torch.tensor(index), index % 2 == 0, 2**40 + index


def views_of_one(index: int) -> Any:
    """Views of one tensor with other strides."""
    base = torch.arange(12.0).reshape(3, 4) + index
    return base.t(), base[:, ::2], base[1], base.expand(2, 3, 4)


ODD = (
    mixed_dtypes,
    narrow_first,
    ints_then_float,
    float_then_ints,
    needs_grad,
    sizes_differ,
    dimensions_differ,
    lists_differ,
    unknown_type,
    keys_differ,
    sparse,
    strings_in_numpy,
    parameter,
    complex_numbers,
    scalars,
    views_of_one,
)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("function", ODD, ids=lambda function: function.__name__)
def test_default_collate_keeps_each_contexts_semantics(function: Any, num_workers: int) -> None:
    """In a worker torch stacks into a tensor made beforehand: the first dtype wins, requires_grad raises, sizes that
    differ are told otherwise. In the training process it does not. Ours keeps both."""
    assert_same(
        Program(lambda: {"dataset": data.Shared(4, function), "batch_size": 2, "num_workers": num_workers}), "strict"
    )


@both_modes
def test_mixed_dtypes_take_the_first_in_a_worker(mode: str) -> None:
    """The rule itself, so that it does not change unnoticed."""
    loader = RobustDataLoader(data.Shared(2, mixed_dtypes), batch_size=2, num_workers=1, **MODES[mode])
    assert next(iter(loader)).dtype is torch.float64
    loader = RobustDataLoader(data.Shared(2, narrow_first), batch_size=2, num_workers=1, **MODES[mode])
    assert next(iter(loader)).dtype is torch.float16


# --- what is read, and when -------------------------------------------------------------------------------------------


@both_modes
@pytest.mark.parametrize("num_workers", [0, 2])
def test_indices_reach_the_dataset_as_the_sampler_made_them(mode: str, num_workers: int) -> None:
    """Strings, tuples, tensors, arrays, None and dicts are indices too, and a batch keeps its own container."""
    odd: list[Any] = ["a", (1, "b"), torch.tensor(3), np.int64(4), None, {"k": 5}, 2**70, b"x", 1.5]

    def program(**more: Any) -> Program:
        return Program(lambda: {"dataset": Echo(), "collate_fn": data.identity, "num_workers": num_workers, **more})

    assert_same(program(sampler=odd, batch_size=None), mode)
    assert_same(program(sampler=odd, batch_size=2), mode)
    assert_same(program(batch_sampler=[("a", 1), [2], torch.tensor([3, 4]), np.array([5, 6]), range(2)]), mode)
    assert_same(program(sampler=[[1, 2], (3,), torch.arange(3)], batch_size=None), mode)


class Echo(Dataset[Any]):
    """Gives back the index."""

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: Any) -> Any:
        return index, type(index).__name__


class Slices:
    """A batch sampler that yields slices of one permutation, as tensors."""

    def __init__(self, size: int) -> None:
        self.order = torch.randperm(size, generator=torch.Generator().manual_seed(1))

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self.order.split(64))

    def __len__(self) -> int:
        return -(-len(self.order) // 64)


@both_modes
@pytest.mark.parametrize("num_workers", [0, 2])
def test_indices_that_are_views_of_a_permutation(mode: str, num_workers: int) -> None:
    """A tensor may be the sampler, or what it yields. A worker gets what an index holds, and not the permutation."""

    def program(**more: Any) -> Program:
        return Program(lambda: {"dataset": Echo(), "collate_fn": data.identity, "num_workers": num_workers, **more})

    assert_same(program(sampler=SubsetRandomSampler(torch.arange(2_000)), batch_size=64), mode)
    assert_same(program(batch_sampler=Slices(2_000)), mode)
    if num_workers:
        loader = RobustDataLoader(
            StorageSizes(), sampler=torch.arange(2_000), batch_size=64, num_workers=num_workers, **MODES[mode]
        )
        assert {size for batch in loader for size in batch.tolist()} == {8}


class StorageSizes(Dataset[Any]):
    """How much memory the index holds on to."""

    def __len__(self) -> int:
        return 2_000

    def __getitem__(self, index: torch.Tensor) -> int:
        return int(index.untyped_storage().nbytes())


@both_modes
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_batch_without_indices(mode: str, num_workers: int) -> None:
    """An empty batch is what collate_fn makes of an empty list, in its turn."""
    program = Program(
        lambda: {
            "dataset": Echo(),
            "batch_sampler": [[1], [], [2]],
            "collate_fn": data.identity,
            "num_workers": num_workers,
        }
    )
    assert_same(program, mode)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_batch_without_indices_in_default_collate(num_workers: int) -> None:
    """torch raises IndexError there, and goes on."""
    assert_same(
        Program(lambda: {"dataset": range(3), "batch_sampler": [[1], [], [2]], "num_workers": num_workers}), "strict"
    )


@both_modes
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("size", [0, 1, 5, 6])
def test_the_last_batch(mode: str, num_workers: int, drop_last: bool, size: int) -> None:
    """drop_last, and datasets smaller than a batch or empty, give torch's lengths and batches."""
    dataset = TensorDataset(torch.arange(size), torch.arange(size) / 2)
    assert_same(
        Program(lambda: {"dataset": dataset, "batch_size": 3, "drop_last": drop_last, "num_workers": num_workers}), mode
    )
    assert_same(
        Program(
            lambda: {
                "dataset": data.SizedStream("int", size, shard="info"),
                "batch_size": 3,
                "drop_last": drop_last,
                "num_workers": num_workers,
            }
        ),
        mode,
    )


@both_modes
def test_more_workers_than_batches(mode: str) -> None:
    """Workers that never get a task start and leave like the others."""
    assert_same(Program(lambda: {"dataset": data.Samples("int", 1), "num_workers": 3}, epochs=(None, None)), mode)


@both_modes
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_longer_than_it_said(mode: str, num_workers: int) -> None:
    """Each batch past the reported length is warned of in torch's words."""
    torchs = assert_same(
        Program(
            lambda: {
                "dataset": data.SizedStream("int", 4, shard="none"),
                "batch_size": None,
                "num_workers": num_workers,
            }
        ),
        mode,
    )
    assert len(torchs.warned) == (4 if num_workers else 0)


@both_modes
def test_large_batches_cross_whole(mode: str) -> None:
    """Batches far larger than any socket buffer arrive, in order, from several workers."""
    assert_same(
        Program(
            lambda: {"dataset": data.Shared(4, large), "batch_size": 2, "num_workers": 2, "collate_fn": data.identity}
        ),
        mode,
    )


def large(index: int) -> Any:
    """About 3 MB in three forms."""
    return (
        torch.full((300_000,), index).byte(),
        np.full(300_000, index, dtype=np.float64)[::3],
        b"x" * 300_000,
        torch.zeros(200_000)[:: index + 1][:10],
    )


def odd_arrays(index: int) -> Any:
    """Arrays that may not be written to, of the other byte order, of strange orders, and of subclasses."""
    frozen = np.arange(3_000) + index
    frozen.flags.writeable = False
    return {
        "frozen": frozen,
        "small": frozen[:3],
        "foreign": np.arange(4, dtype=">i4"),
        "backwards": np.arange(4)[::-1],
        "fortran": np.asfortranarray(np.ones((2, 3))),
        "turned": np.ones((2, 3, 4)).transpose(2, 0, 1),
        "record": np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]),
        "foreign record": np.array([(1, 2.0)], dtype=[("a", ">i4"), ("b", ">f8")]),
        "foreign records": np.zeros(1_000, dtype=[("a", ">i4"), ("b", ">f8", 2)]),
        "foreign records turned": np.zeros((40, 50), dtype=[("a", ">i4"), ("b", "<f8", 2)])[::2].T,
        "masked": np.ma.masked_equal([1, 2, 3], 2),
        "objects": np.array([{"a": 1}, None], dtype=object),
        "text": np.array(["a", "bc"]),
        "time": np.array(["2020-01-01"], dtype="M8[D]"),
        "empty": np.empty((0, 3)),
        "scalar": np.array(5),
    }


def odd_torch_things(index: int) -> Any:
    """What a batch may hold besides plain tensors and arrays."""
    return {
        "storage": torch.arange(3).untyped_storage().tolist(),
        "dtype": torch.float16,
        "size": torch.Size([1, 2]),
        "device": torch.device("cpu"),
        "generator": torch.Generator().manual_seed(index).get_state(),
        "sparse": torch.eye(3).to_sparse().to_dense(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "channels last": torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "grad": torch.ones(2, requires_grad=True),
        "range": range(index),
        "set": frozenset([index]),
        "class": data.Pair,
    }


@both_modes
@pytest.mark.parametrize("function", [odd_arrays, odd_torch_things], ids=lambda function: function.__name__)
def test_odd_things_cross_uncollated(mode: str, function: Any) -> None:
    """A trainer gets them from a worker as it gets them from torch's: types, dtypes, strides, and free to write to."""
    arguments = {"batch_size": None, "num_workers": 1, "collate_fn": data.identity}
    assert_same(Program(lambda: {"dataset": data.Shared(2, function), **arguments}), mode)


RAGGED = torch.arange(20_000, dtype=torch.float32)
CUTS = [3_000, 3_000, 6_000, 9_000, 9_000, 9_000, 12_000, 20_000, 20_000]


def ragged(index: int) -> Any:
    """Parts of one flat tensor, some of no length; of odd ones two, with an empty one between."""
    part = RAGGED[CUTS[index] : CUTS[index + 1]]
    return (part, RAGGED[5:5].reshape(0, 3).t(), RAGGED[18_000 + index :]) if index % 2 else part


@both_modes
@pytest.mark.parametrize("batch_size", [None, 3])
def test_ragged_samples_cut_from_one_tensor(mode: str, transport: str, batch_size: int | None) -> None:
    """Empty ones arrive beside others of the same memory, with the strides that torch gives them."""
    loaders = [
        kind(data.Shared(8, ragged), batch_size=batch_size, num_workers=1, collate_fn=data.identity, **options)
        for kind, options in ((DataLoader, {}), (RobustDataLoader, MODES[mode]))
    ]
    theirs, ours = map(list, loaders)
    assert fingerprint(ours) == fingerprint(theirs)


def rows(index: int, length: int = 4) -> torch.Tensor:
    """A small tensor, or a large one."""
    return torch.arange(length) + float(index)


def large_rows(index: int) -> torch.Tensor:
    """One whose batches are laid into the arena."""
    return rows(index, 4_000)


def detached_in_place(samples: list[Any]) -> Any:
    """What ``default_collate`` makes is no view: autograd lets these two happen to it."""
    with torch.no_grad():
        batch = default_collate(samples)
    batch.mul_(torch.ones(batch.shape[-1], requires_grad=True))
    return batch.detach_()


@pytest.mark.parametrize("kind", [DataLoader, RobustDataLoader])
@pytest.mark.parametrize("function", [rows, large_rows], ids=lambda function: function.__name__)
def test_batches_are_no_views(transport: str, kind: Any, function: Any) -> None:
    """Autograd takes a batch, in the worker and in the trainer, for a tensor of its own: it may be detached in place,
    and written to outside of the ``no_grad`` that it was taken in."""
    loader = kind(data.Shared(4, function), batch_size=2, num_workers=1, collate_fn=detached_in_place)
    iterator = iter(loader)
    with torch.no_grad():
        batches = [next(iterator), next(iterator)]
    for number, batch in enumerate(batches):
        batch.detach_()
        batch.mul_(torch.ones(batch.shape[-1], requires_grad=True))
        assert batch[:, 0].tolist() == [2.0 * number, 2.0 * number + 1]


def sometimes_a_tensor(index: int) -> Any:
    """Of several kinds."""
    return torch.tensor(1.0) if index % 2 == 0 else [7, None][index // 2]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_tensors_collated_with_other_things(num_workers: int) -> None:
    """``default_collate`` refuses them with torch's exception."""
    dataset = data.Shared(4, sometimes_a_tensor)
    assert_same(Program(lambda: {"dataset": dataset, "batch_size": 2, "num_workers": num_workers}), "strict")


class Packet:
    """Bytes that say themselves how they are pickled, with a buffer beside the pickle where there may be one."""

    def __init__(self, content: Any) -> None:
        self.content = content

    def __reduce_ex__(self, protocol: Any) -> Any:
        return read_packet, (pickle.PickleBuffer(bytearray(self.content)) if protocol >= 5 else self.content,)


def read_packet(content: Any) -> list[int]:
    """Reads single bytes, and pairs of them."""
    view = memoryview(content)
    return [view[0], view.cast("H")[1], len(view)]


def packets(index: int) -> Any:
    """A small one and a large one."""
    return Packet(bytes([index, 1, 2, 3])), Packet(bytes([index, 1, 2, 3] * 3_000))


@both_modes
def test_buffers_of_the_users_own_pickling(mode: str) -> None:
    """What a user's unpickling gets for a buffer (PEP 574) can be read byte by byte and cast, as any buffer can."""
    arguments = {"batch_size": None, "num_workers": 1, "collate_fn": data.identity}
    assert_same(Program(lambda: {"dataset": data.Shared(2, packets), **arguments}), mode)


def numbered(index: int) -> torch.Tensor:
    """Made without asking for a device."""
    return torch.from_numpy(np.full(4, index, dtype=np.float32))


def no_device_here(worker_id: int) -> None:
    """The worker has the trainer's default device, of which it can use nothing."""
    torch.set_default_device("cuda")


@both_modes
def test_a_default_device_in_the_worker(mode: str) -> None:
    """Tensors on the CPU are collated there, whatever the default device is."""
    assert_same(
        Program(
            lambda: {
                "dataset": data.Shared(4, numbered),
                "batch_size": 2,
                "num_workers": 1,
                "worker_init_fn": no_device_here,
            }
        ),
        mode,
    )


# --- the two differences ----------------------------------------------------------------------------------------------


def test_batches_are_not_in_torchs_shared_memory() -> None:
    """A stated difference: tensors from workers own ordinary memory, so is_shared() is False."""
    for batch in RobustDataLoader(TensorDataset(torch.ones(4, 3)), num_workers=1, **STRICT):
        assert not batch[0].is_shared()


@pytest.mark.parametrize("transport", ["auto", "pipe"])
def test_a_batch_owns_exactly_its_memory(transport: Any, tmp_path: Any) -> None:
    """A tensor's storage is as large as the tensor: torch.save of it drags nothing along; and it is writable."""
    for batch in RobustDataLoader(data.Samples("tensor", 8), batch_size=4, num_workers=1, transport=transport):
        tensor = batch[0]
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        tensor.zero_()
        torch.save(tensor, tmp_path / "t.pt")
        assert torch.equal(torch.load(tmp_path / "t.pt"), tensor)


def part_and_whole(samples: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """A view, and after it what it is a view of."""
    whole = torch.zeros(len(samples), 20)
    return whole[:1], whole


@pytest.mark.parametrize("kind", [DataLoader, RobustDataLoader])
@pytest.mark.parametrize("swapped", [False, True])
def test_what_shares_memory_shares_it_in_the_trainer(kind: Any, swapped: bool) -> None:
    """A view before its base, and the other way round."""

    def collate(samples: list[Any]) -> Any:
        return part_and_whole(samples)[:: -1 if swapped else 1]

    for first, second in kind(range(4), batch_size=4, num_workers=1, collate_fn=collate):
        first.fill_(7)
        assert second[0].tolist() == [7.0] * 20


def twice_the_same(index: int) -> Any:
    """One small array two times over."""
    image = np.zeros(10, dtype=np.float32)
    return image, image


def twice_the_same_large(index: int) -> Any:
    """One large array two times over."""
    image = np.zeros(5_000, dtype=np.float32)
    return image, image


def batch_and_its_array(samples: list[Any]) -> Any:
    """Two storages over the same memory, which may be shared already."""
    batch = default_collate(samples)[0]
    return batch, torch.from_numpy(batch.numpy()), batch.flatten()[1:]


@pytest.mark.parametrize("kind", [DataLoader, RobustDataLoader])
@pytest.mark.parametrize("function", [twice_the_same, twice_the_same_large], ids=lambda function: function.__name__)
def test_what_is_converted_twice_is_two_tensors(transport: str, kind: Any, function: Any) -> None:
    """A change in place of one reaches no other, although the worker had both over one array's memory."""
    for one, other in kind(data.Shared(3, function), batch_size=None, num_workers=1):
        one.add_(100)
        assert float(other.sum()) == 0
    loader = kind(data.Shared(3, function), batch_size=2, num_workers=1, collate_fn=batch_and_its_array)
    for one, other, view in loader:
        one.add_(100)
        assert float(other.sum()) == 0
        assert float(view.sum()) == 100 * view.numel()


class Picture(torch.Tensor):
    """A tensor subclass, as libraries of images have them."""


def pictures(index: int) -> Any:
    """One of them, and a part of it."""
    picture = torch.zeros(3, 40, 50)[1:].as_subclass(Picture)
    return picture, picture[0]


@pytest.mark.parametrize("kind", [DataLoader, RobustDataLoader])
def test_subclasses_share_memory_too(transport: str, kind: Any) -> None:
    """A view of a tensor subclass is one in the trainer."""
    loader = kind(data.Shared(2, pictures), batch_size=None, num_workers=1, collate_fn=data.identity)
    for picture, part in loader:
        assert type(picture) is type(part) is Picture
        picture.fill_(5)
        assert float(part.sum()) == 5 * 40 * 50


@pytest.mark.parametrize("transport", ["auto", "pipe"])
def test_kept_batches_stay_as_they_were(transport: Any) -> None:
    """Batches that the trainer keeps are not written over by later ones, nor by the end of the loader."""
    loader = RobustDataLoader(data.Shared(30, marked), batch_size=2, num_workers=2, transport=transport)
    kept = [batch for _ in range(2) for batch in loader]
    for number, batch in enumerate(kept):
        wanted = [2 * (number % 15), 2 * (number % 15) + 1]
        assert batch[:, 0].tolist() == wanted
        assert batch[:, -1].tolist() == wanted


def marked(index: int) -> torch.Tensor:
    """A tensor that is larger than what rides inside a frame."""
    return torch.full((20_000,), index)
