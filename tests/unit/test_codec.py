"""What the codec takes apart, it puts together again: values, dtypes, strides, aliasing."""

from __future__ import annotations

import itertools
import pickle
from collections import OrderedDict, namedtuple
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from robustloader.transport import codec
from tests.support.parity_run import fingerprint

Point = namedtuple("Point", ["x", "y"])

DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.complex128,
)


@dataclass
class Record:
    """A dataclass of a user."""

    name: str
    values: Any
    tags: list[Any] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Slotted:
    """One with slots."""

    values: Any


class Fancy(torch.Tensor):
    """A tensor subclass."""


class Stubborn(torch.Tensor):
    """One that says itself how it is pickled."""

    @staticmethod
    def of(count: int) -> Any:
        return torch.full((count,), 7).as_subclass(Stubborn)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Stubborn.of, (len(self),)


def carry(value: Any) -> Any:
    """Through the codec, as the channel would: each buffer copied to memory of its own, of exactly its size."""
    parcel = codec.dumps(value)
    blocks = []
    for low, memory in parcel.buffers:
        block = torch.empty(memory.nbytes, dtype=torch.uint8, device="cpu")
        if memory.nbytes:
            block.numpy()[:] = np.frombuffer(memory, dtype=np.uint8)
        blocks.append((low, block))
    return codec.loads(bytes(parcel.pickled), blocks)


def make_tensor(shape: tuple[int, ...], dtype: torch.dtype, how: str) -> torch.Tensor:
    """A tensor of this shape and dtype with the strides, offset and storage that ``how`` names."""
    count = int(np.prod(shape, dtype=int))
    values = (torch.arange(count) % 100).reshape(shape)
    tensor = values.to(dtype) if dtype is not torch.bool else values % 3 == 0
    match how:
        case "turned":
            return tensor.transpose(0, -1) if tensor.ndim > 1 else tensor
        case "spread":
            return tensor.unsqueeze(0).expand(3, *shape)
        case "stepped":
            return tensor[::2] if tensor.ndim else tensor
        case "inside":  # a view of something much larger
            big = torch.zeros(5_000 + count, dtype=dtype)
            big[2_500 : 2_500 + count] = tensor.flatten()
            return big[2_500 : 2_500 + count].reshape(shape)
        case "tail":
            return tensor[1:] if tensor.ndim and shape[0] > 1 else tensor
    return tensor


shapes = st.lists(st.integers(0, 6), max_size=4).map(tuple) | st.sampled_from([(), (0,), (40, 50), (3_000,), (1, 1)])
tensors = st.builds(
    make_tensor,
    shapes,
    st.sampled_from(DTYPES),
    st.sampled_from(["plain", "turned", "spread", "stepped", "inside", "tail"]),
)


def make_array(shape: tuple[int, ...], dtype: str, how: str, frozen: bool) -> np.ndarray:
    """An array likewise."""
    array = np.arange(int(np.prod(shape, dtype=int))).reshape(shape).astype(dtype)
    if how == "fortran":
        array = np.asfortranarray(array)
    elif how == "stepped" and array.ndim:
        array = array[::2]
    elif how == "backwards" and array.ndim:
        array = array[::-1]
    array.flags.writeable = not frozen
    return array


arrays = st.builds(
    make_array,
    shapes,
    st.sampled_from(["f4", "f8", "i8", "u1", "?", "c16", "U3", "S2", "M8[s]", "O"]),
    st.sampled_from(["plain", "fortran", "stepped", "backwards"]),
    st.booleans(),
)
plain = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=20)
    | st.binary(max_size=20)
    | st.binary(max_size=20).map(bytearray)
    | st.just(b"long" * 3_000)
    | st.sampled_from([np.float32(1.5), np.int64(-3), np.datetime64("2020-01-01"), torch.float16, ...])
)
nested = st.recursive(
    plain | tensors | arrays,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3).map(OrderedDict)
        | st.builds(Point, inner, inner)
        | st.builds(Record, st.text(max_size=3), inner, st.lists(inner, max_size=2))
        | st.builds(Slotted, inner)
    ),
    max_leaves=12,
)


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(value=nested)
def test_a_round_trip_changes_nothing(value: Any) -> None:
    """Nested structures of tensors, arrays and anything that pickles arrive as they were."""
    found = carry(value)
    assert fingerprint(found) == fingerprint(_as_after_a_pickle(value))


def _as_after_a_pickle(value: Any) -> Any:
    """Arrays as torch's queue gives them back: writable, contiguous in one of two orders; the rest as it is."""
    if isinstance(value, np.ndarray):
        return pickle.loads(pickle.dumps(value, 4))
    if isinstance(value, dict):
        return type(value)((key, _as_after_a_pickle(part)) for key, part in value.items())
    if isinstance(value, Point):
        return Point(*map(_as_after_a_pickle, value))
    if isinstance(value, (list, tuple)):
        return type(value)(map(_as_after_a_pickle, value))
    if isinstance(value, Record):
        return Record(value.name, _as_after_a_pickle(value.values), _as_after_a_pickle(value.tags))
    if isinstance(value, Slotted):
        return Slotted(_as_after_a_pickle(value.values))
    return value


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(tensor=tensors)
def test_a_tensor_brings_only_its_own_memory(tensor: torch.Tensor) -> None:
    """What arrives of a large tensor's view is about the view: storing it stores no more than that."""
    found = carry(tensor)
    used = 0
    if tensor.numel():
        used = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    exact = used * tensor.element_size()
    limit = exact + codec.ALIGNMENT if tensor.untyped_storage().nbytes() > codec.INLINE_BYTES else codec.INLINE_BYTES
    assert exact <= found.untyped_storage().nbytes() <= max(limit, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 100, 1_024, 5_000, 100_000])
def test_the_storage_has_exactly_the_tensors_size(dtype: torch.dtype, count: int) -> None:
    """A whole tensor's storage arrives at its exact size, writable, and in memory of its own."""
    tensor = torch.ones(count, dtype=dtype)
    found = carry(tensor)
    assert found.untyped_storage().nbytes() == tensor.nbytes
    found.zero_()
    assert bool((tensor == 1).all())
    assert bool((found == 0).all())


@pytest.mark.parametrize("count", [10, 10_000])
def test_what_shares_memory_still_does(count: int) -> None:
    """Views of one storage are views of one storage again, however they are nested; the same tensor is one object."""
    base = torch.zeros(count)
    whole, half, same, other = carry({"a": [base], "b": (base[count // 2 :],), "c": [base], "d": base.clone()}).values()
    whole[0].fill_(3)
    assert bool((half[0] == 3).all())
    assert whole[0] is same[0]
    assert bool((other == 0).all())


@pytest.mark.parametrize("count", [10, 10_000])
@pytest.mark.parametrize(
    "order", list(itertools.permutations(["view", "base", "bits", "leaf", "storage"], 3)), ids="-".join
)
def test_memory_is_shared_whatever_comes_first(count: int, order: tuple[str, ...]) -> None:
    """A part, the whole, the whole as another dtype, a leaf that requires grad upon it, and the storage itself."""
    base = torch.zeros(count)
    parts: dict[str, Any] = {
        "view": base[: count // 2],
        "base": base,
        "bits": base.view(torch.int32),
        "leaf": base.detach().requires_grad_(),
        "storage": base.untyped_storage(),
    }
    found = carry([parts[name] for name in order])
    addresses = {part.data_ptr() for part in found}
    assert len(addresses) == 1
    for name, part in zip(order, found, strict=True):
        assert type(part) is type(parts[name])
        if isinstance(part, torch.Tensor):
            assert (part.dtype, part.shape) == (parts[name].dtype, parts[name].shape)
            assert part.requires_grad == parts[name].requires_grad


@pytest.mark.parametrize("count", [10, 10_000])
def test_storages_over_the_same_memory_are_taken_apart(count: int) -> None:
    """``torch.from_numpy`` of one array makes a new storage each time: as many arrive, each with its own views."""
    array = np.zeros(count, dtype=np.float32)
    one, other, part = (torch.from_numpy(shown) for shown in (array, array, array[1:]))
    found = carry([one, one[2:], other, part, other.untyped_storage()])
    found[0].fill_(1)
    assert [float(tensor.sum()) for tensor in found[:4]] == [count, count - 2, 0, 0]
    found[2].fill_(1)
    assert float(found[3].sum()) == 0
    assert found[4].data_ptr() == found[2].data_ptr()


@pytest.mark.parametrize("count", [10, 10_000])
@pytest.mark.parametrize("view_first", [False, True])
def test_a_default_device_plays_no_part(count: int, view_first: bool) -> None:
    """A trainer that has one set gets batches on the CPU all the same: whole tensors, aliases, views, storages."""
    base = torch.arange(count)
    parts = [base, base[1:], torch.zeros(count, requires_grad=True), np.arange(count), torch.ones(0), base.clone()[2:]]
    parts += [torch.ones(count).untyped_storage()]
    if view_first:
        parts.reverse()
    with torch.device("meta"):
        found = carry(parts)
    assert fingerprint(found) == fingerprint(parts)


@pytest.mark.parametrize("count", [10, 10_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint16], ids=str)
@pytest.mark.parametrize("plain_first", [False, True])
def test_subclasses_share_memory_and_bring_only_their_own(count: int, dtype: torch.dtype, plain_first: bool) -> None:
    """Views of one storage whose type is a subclass are views of one storage again, with plain ones; each keeps what
    was set on it, and a small view of something large stays small."""
    base = torch.zeros(100, count, dtype=dtype)
    marked = base[2].as_subclass(Fancy)
    marked.origin = "here"
    order = slice(None, None, -1 if plain_first else 1)
    parcel_bytes = codec.dumps([marked, marked[1:]]).nbytes
    assert parcel_bytes < 2 * marked.nbytes + 2 * codec.INLINE_BYTES
    found, view, plain = carry([marked, marked[1:], base[2]][order])[order]
    assert (type(found), type(view), type(plain)) == (Fancy, Fancy, torch.Tensor)
    assert (found.dtype, found.origin) == (dtype, "here")
    found.fill_(1)
    assert bool((view == 1).all()) and bool((plain == 1).all())


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_subclass_keeps_whether_it_requires_grad(requires_grad: bool) -> None:
    """And with a pickling of its own, a subclass uses that."""
    found, made = carry([torch.ones(3).as_subclass(Fancy).requires_grad_(requires_grad), Stubborn.of(3)])
    assert found.requires_grad == requires_grad
    assert (type(made), made.tolist()) == (Stubborn, [7, 7, 7])


def test_disjoint_views_of_one_storage_keep_their_distance() -> None:
    """Two views at either end of a storage stay apart, and a third over both sees what is written to them."""
    base = torch.arange(20_000)
    first, last, all_of_it = carry((base[10:20], base[-30:-20], base[5:-5]))
    first.fill_(-1)
    last.fill_(-2)
    assert all_of_it[5:15].tolist() == [-1] * 10
    assert all_of_it[-25:-15].tolist() == [-2] * 10
    assert all_of_it[15:20].tolist() == [20, 21, 22, 23, 24]


@pytest.mark.parametrize("count", [1_000, 20_000])
@pytest.mark.parametrize("kind", [torch.Tensor, Fancy])
@pytest.mark.parametrize("place", [0, 1_000, 300, 700])
@pytest.mark.parametrize("empty_first", [False, True])
def test_an_empty_view_may_lie_anywhere_in_its_storage(
    count: int, kind: type[torch.Tensor], place: int, empty_first: bool
) -> None:
    """Also before, behind and between what the other views of the storage use, which is all that crosses of it."""
    base = torch.arange(count, dtype=torch.float32)
    used, empty = base[count * 3 // 10 : count // 2].as_subclass(kind), base[place:place].as_subclass(kind)
    turned = base[place:place].reshape(0, 4).t().as_subclass(kind)
    leaf = base[place:place].detach().requires_grad_()
    parts = [empty, turned, leaf, used] if empty_first else [used, empty, turned, leaf]
    found = carry(parts)
    assert fingerprint(found) == fingerprint(parts)
    assert [part.stride() for part in found] == [part.stride() for part in parts]
    assert len({part.untyped_storage().data_ptr() for part in found}) == 1


def test_empty_parts_of_an_array_cross() -> None:
    """Arrays cross one by one, so an empty one beside other parts of its memory is nothing special."""
    base = np.arange(20_000)
    parts = [base[5_000:5_000], base[5_000:9_000], base[7_000:7_000].reshape(0, 3)]
    assert fingerprint(carry(parts)) == fingerprint(parts)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.int32), (torch.uint8, torch.complex128)], ids=str)
def test_one_storage_seen_as_two_dtypes(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """A view as another dtype shares its memory afterwards, too."""
    base = torch.arange(8_000, dtype=torch.uint8)[64:].view(dtypes[0])
    one, two = carry((base, base.view(dtypes[1])))
    one.zero_()
    assert bool((two == 0).all())


@pytest.mark.parametrize("size", [4, 4_000])
@pytest.mark.parametrize("frozen", [False, True])
def test_arrays_arrive_writable(size: int, frozen: bool) -> None:
    """As after torch's loader, a trainer may write to a NumPy array, even one that was read-only in the worker."""
    array = np.arange(size)
    array.flags.writeable = not frozen
    found = carry([array])[0]
    found[:] = 0
    assert array[-1] == size - 1


@pytest.mark.parametrize("count", [0, 1, 10, 125, 126, 512])
def test_small_arrays_are_as_torchs_queue_makes_them(count: int) -> None:
    """They need no buffer beside the pickle, which would cost a page and an entry each; those that torch's loader hands
    out as their own memory's owners may be resized here, too."""
    arrays = [np.full(count, number, dtype=np.float64) for number in range(3)]
    assert not codec.dumps(arrays).buffers
    found, wanted = carry(arrays), pickle.loads(pickle.dumps(arrays, 4))
    for ours, torchs, array in zip(found, wanted, arrays, strict=True):
        assert np.array_equal(ours, array)
        assert (ours.flags.owndata, ours.flags.writeable) == (torchs.flags.owndata, True)
        ours[:] = -1
    assert [float(array.sum()) for array in arrays] == [0, count, 2 * count]


@pytest.mark.parametrize(
    "array",
    [
        pytest.param(np.arange(4, dtype=">i4"), id="byte order"),
        pytest.param(np.arange(4_000, dtype=">i4"), id="byte order, large"),
        pytest.param(np.array([(1, 2)] * 3, [("a", ">i4"), ("b", ">f4")]), id="records of another byte order"),
        pytest.param(np.array([(1, 2)] * 3_000, [("a", ">i4"), ("b", ">f4", 2)]), id="the same, large"),
        pytest.param(np.array([(1, 2)] * 3_000, [("a", ">i4"), ("b", "<f4")])[::2], id="the same, in steps"),
        pytest.param(np.ones((2, 3, 4)).transpose(2, 0, 1), id="turned"),
        pytest.param(np.ones((2, 3, 4))[:, ::2].transpose(2, 0, 1), id="turned steps"),
    ],
)
def test_arrays_arrive_as_through_torchs_queue(array: np.ndarray) -> None:
    """In the machine's byte order (but for the fields of records), and contiguous: what torch.from_numpy() and view()
    take with torch's loader, they take here."""
    found, wanted = carry(array), pickle.loads(pickle.dumps(array, 4))
    assert (found.dtype, found.strides) == (wanted.dtype, wanted.strides)
    assert found.tobytes() == wanted.tobytes()
    assert np.array_equal(found, array)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: torch.eye(4).to_sparse(), id="sparse"),
        pytest.param(lambda: torch.eye(4).to_sparse_csr(), id="csr"),
        pytest.param(lambda: torch.quantize_per_tensor(torch.ones(4), 0.5, 1, torch.quint8), id="quantised"),
        pytest.param(lambda: torch.tensor([1 + 2j]).conj(), id="conjugated"),
        pytest.param(lambda: torch.tensor([1 + 2j]).conj().imag, id="negated"),
        pytest.param(lambda: torch.ones(3).as_subclass(Fancy), id="subclass"),
        pytest.param(lambda: torch.nn.Parameter(torch.ones(3)), id="parameter"),
        pytest.param(lambda: torch.ones(3, requires_grad=True), id="requires_grad"),
        pytest.param(lambda: torch.ones(3, device="meta"), id="meta"),
        pytest.param(lambda: torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last), id="channels_last"),
        pytest.param(lambda: torch.nn.utils.rnn.pack_sequence([torch.ones(3), torch.ones(2)]), id="packed"),
        pytest.param(lambda: torch.Generator().manual_seed(3).get_state(), id="generator state"),
        pytest.param(lambda: torch.ones(3).untyped_storage(), id="storage"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse (CSR|invariant):UserWarning", "ignore:.*[Qq]uantiz.*", "ignore:TypedStorage")
def test_exotic_tensors_go_by_value(make: Any) -> None:
    """What is no plain CPU tensor arrives all the same: same type, same layout, same values."""
    value = make()
    found = carry([value])[0]
    assert type(found) is type(value)
    if isinstance(value, torch.Tensor):
        assert (found.layout, found.dtype, found.shape) == (value.layout, value.dtype, value.shape)
        assert (found.requires_grad, found.device) == (value.requires_grad, value.device)
        if value.device.type != "meta":
            assert repr(found.to_dense().tolist() if not found.is_quantized else found.dequantize().tolist()) == repr(
                value.to_dense().tolist() if not value.is_quantized else value.dequantize().tolist()
            )
    if isinstance(value, torch.Tensor) and value.layout is torch.strided:
        assert found.stride() == value.stride()


def test_a_tensor_inside_a_graph_is_refused() -> None:
    """As with torch, what requires grad and is no leaf cannot cross: the error says what to call."""
    with pytest.raises(RuntimeError, match="detach"):
        codec.dumps([torch.ones(2, requires_grad=True) * 2])


def test_what_cannot_be_pickled_raises_what_its_pickling_raises() -> None:
    """A lambda in a batch is the user's error, and told as pickle tells it."""
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        codec.dumps({"f": lambda: None})


def test_a_parcel_knows_its_size() -> None:
    """``nbytes`` counts the pickle and the buffers."""
    parcel = codec.dumps([torch.zeros(100_000, dtype=torch.uint8), np.zeros(50_000, dtype=np.uint8)])
    assert 150_000 <= parcel.nbytes <= 152_000
