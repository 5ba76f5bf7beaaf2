"""Batches to bytes and back: a pickle whose tensors and arrays travel beside it, as raw memory.

A :class:`Parcel` is one pickle and a list of buffers. Plain CPU tensors are described in the pickle by dtype, size,
stride and offset into a *storage*; each storage's bytes, cut to the extent that the batch's tensors really use, are one
buffer, so tensors that share memory still share it on the other side, and a small view of a large tensor stays small.
Larger NumPy arrays use pickle's own out-of-band buffers (PEP 574). What fits neither (sparse, quantised, conjugated,
CUDA) goes by value through its own ``__reduce_ex__``, and so do subclasses, all but their memory: torch's reducers for
multiprocessing would pass descriptors, which needs a connection to a worker that may be dead or stuck.
"""

from __future__ import annotations

import copyreg
import ctypes
import functools
import io
import pickle
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple

import numpy as np
import torch

from robustloader.system import torch_private

__all__ = ["INLINE_BYTES", "REDUCERS", "Buffer", "Parcel", "Placed", "dumps", "loads"]

INLINE_BYTES = 4_096
"""Storages and arrays up to this size ride inside the pickle: a buffer of its own costs more than the copy."""

ALIGNMENT = 64
"""Extents begin at multiples of this many bytes of their storage, so that every dtype stays aligned."""

_DTYPES: tuple[torch.dtype, ...] = tuple(
    dict.fromkeys(value for _, value in sorted(vars(torch).items()) if isinstance(value, torch.dtype))
)
_CODE_OF = {dtype: code for code, dtype in enumerate(_DTYPES)}

_NOTHING = torch.empty(0, device="cpu")
"""What is made by its ``new_empty`` lies on the CPU, whatever the default device is: quicker than ``device="cpu"``."""


class Buffer(NamedTuple):
    """Memory beside a pickle. ``low`` is where it began in the tensor storage it was cut from; -1 for other buffers."""

    low: int
    memory: memoryview

    @property
    def address(self) -> int:
        """Where the memory lies in this process."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self.memory))


class Placed(NamedTuple):
    """A buffer in the worker's arena: ``size`` bytes from ``position``, in the extent that is named ``extent``."""

    low: int
    position: int
    size: int
    extent: int


class Parcel(NamedTuple):
    """A pickled object and the memory that belongs to it. ``keep`` holds what owns that memory."""

    pickled: bytes | memoryview | Placed
    buffers: Sequence[Buffer | Placed]
    keep: Any = None

    @property
    def nbytes(self) -> int:
        """Size of all of it in bytes."""
        return _size(self.pickled) + sum(map(_size, self.buffers))


def _size(part: bytes | memoryview | Buffer | Placed) -> int:
    if isinstance(part, Placed):
        return part.size
    return part.memory.nbytes if isinstance(part, Buffer) else len(part)


def dumps(obj: Any) -> Parcel:
    """Pickle ``obj``; raises what its own pickling raises. The parcel is good until ``obj``'s tensors change."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(obj)
    return Parcel(file.getbuffer(), pickler.buffers(), (pickler.storages, obj))


def loads(pickled: bytes | memoryview, buffers: Iterable[tuple[int, Any]] = ()) -> Any:
    """The object again, built upon ``buffers``: pairs of ``low`` and memory of exact size, which is a one-dimensional
    uint8 tensor or a writable object with the buffer protocol.

    Raises whatever the object's own unpickling raises.
    """
    return pickle.loads(pickled, buffers=[_offer(low, block) for low, block in buffers])


def _offer(low: int, block: Any) -> Any:
    if isinstance(block, torch.Tensor):
        return (low, block.untyped_storage()) if low >= 0 else block.numpy()
    return (low, torch.frombuffer(block, dtype=torch.uint8).untyped_storage()) if low >= 0 else block


class _Storage:
    """Stands for a tensor's storage while pickling, and collects the extent that is used of it."""

    __slots__ = ("_high", "_low", "mark", "storage")

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.storage = storage
        self.mark = bytearray(1)
        self._low = storage.nbytes()
        self._high = 0

    def use(self, low: int, high: int) -> None:
        self._low = min(self._low, low)
        self._high = max(self._high, high)

    def extent(self) -> Buffer:
        if self._high <= self._low:
            return Buffer(0, memoryview(b""))
        low = self._low - self._low % ALIGNMENT
        block = (ctypes.c_ubyte * (self._high - low)).from_address(self.storage.data_ptr() + low)
        return Buffer(low, memoryview(block).cast("B"))

    def __reduce__(self) -> tuple[Any, ...]:
        size = self.storage.nbytes()
        if size <= INLINE_BYTES:
            return _inline_storage, (ctypes.string_at(self.storage.data_ptr(), size) if size else b"",)
        # The extent is known only when the whole batch has been seen: a one-byte mark keeps the place of its buffer.
        return tuple, (pickle.PickleBuffer(self.mark),)


class _Pickler(pickle.Pickler):
    """Pickles tensors as the module's docstring says, everything else as multiprocessing would."""

    def __init__(self, file: io.BytesIO) -> None:
        # A method of this object would tie it to itself, and keep the batch alive until the collector comes round.
        self._taken: list[pickle.PickleBuffer] = []
        super().__init__(file, protocol=5, buffer_callback=self._taken.append)
        self.dispatch_table = REDUCERS  # type: ignore[assignment]  # asked for single items only
        # By the id of torch's storage object, which is one and the same for all tensors upon a storage as long as it is
        # held. Addresses will not do: torch.from_numpy() of one array twice makes two storages, as far as torch knows.
        self.storages: dict[int, _Storage] = {}
        self._small: dict[int, tuple[torch.Tensor, torch.UntypedStorage]] = {}  # the first of each, which it fills
        self._marked: dict[int, _Storage] = {}

    def buffers(self) -> list[Buffer]:
        """The buffers in the order in which the pickle asks for them."""
        found = []
        for taken in self._taken:
            memory = taken.raw()
            storage = self._marked.get(id(memory.obj))
            found.append(storage.extent() if storage is not None else Buffer(-1, memory))
        return found

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        if kind is torch.Tensor:
            return self._reduce_tensor(obj)
        if kind is torch.UntypedStorage and obj.device.type == "cpu":
            small = self._small.get(id(obj))
            if small is not None:
                return torch.Tensor.untyped_storage, small[:1]
            storage = self._storage_of(obj)
            storage.use(0, obj.nbytes())
            return _whole_storage, (storage,)
        return NotImplemented

    def _reduce_tensor(self, tensor: torch.Tensor) -> Any:
        if (
            not tensor.is_cpu
            or tensor.layout is not torch.strided
            or tensor.is_quantized
            or tensor.is_nested
            or tensor.is_conj()
            or tensor.is_neg()
        ):
            return NotImplemented
        if tensor.requires_grad and not tensor.is_leaf:
            raise RuntimeError(
                "a batch holds a tensor that requires grad and is not a leaf: autograd does not cross processes; "
                "call detach() on it in the dataset or in collate_fn"
            )
        raw = tensor.untyped_storage()
        nbytes, dtype = raw.nbytes(), tensor.dtype
        size, stride, offset, item = tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), dtype.itemsize
        if 0 < nbytes <= INLINE_BYTES:
            key = id(raw)
            small = self._small.get(key)
            if small is not None:
                return _alias, (small[0], _CODE_OF[dtype], size, stride, offset, tensor.requires_grad)
            # Where a view came first, its storage crosses as one, and this tensor is another view.
            if (
                nbytes == tensor.nbytes
                and stride == _row_major(size)
                and key not in self.storages
                and not tensor.requires_grad
            ):
                self._small[key] = tensor, raw
                return _small_tensor, (_copy(raw.data_ptr(), nbytes), _CODE_OF[dtype], size)
        storage = self._storage_of(raw)
        if not tensor.numel():
            return _rebuild_empty, (storage, _CODE_OF[dtype], size, stride, tensor.requires_grad)
        last = int(offset) + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        storage.use(int(offset) * item, (last + 1) * item)
        return _rebuild_tensor, (storage, _CODE_OF[dtype], size, stride, offset, tensor.requires_grad)

    def _storage_of(self, raw: torch.UntypedStorage) -> _Storage:
        key = id(raw)
        known = self.storages.get(key)
        if known is None:
            known = self.storages[key] = _Storage(raw)
            self._marked[id(known.mark)] = known
        return known


_copy: Any = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t)(
    ("PyByteArray_FromStringAndSize", ctypes.pythonapi)
)
"""``(address, size)`` → the bytes that lie there, as a bytearray. ``ctypes.string_at`` costs three times as much."""


def _reduce_array(array: Any) -> Any:
    """Through torch's queue, which pickles in-band, arrays arrive contiguous, writable and native, the fields of
    records aside; and small ones own their memory. Small ones are pickled likewise here; an out-of-band buffer would
    arrive as it is."""
    if array.nbytes <= INLINE_BYTES:
        return array.__reduce_ex__(4)
    flags, dtype = array.flags, array.dtype
    if not dtype.isnative and dtype.names is None:
        array = np.array(array, dtype=dtype.newbyteorder("="), order="A")
    elif not (flags.writeable and (flags.c_contiguous or flags.f_contiguous)):
        array = np.array(array, order="A")
    return array.__reduce_ex__(5)


def _inline_storage(data: bytes) -> tuple[int, torch.UntypedStorage]:
    if not data:
        return 0, torch.UntypedStorage(0)
    return 0, torch.frombuffer(bytearray(data), dtype=torch.uint8).untyped_storage()


@functools.lru_cache(maxsize=1024)
def _row_major(size: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a new tensor of this size."""
    strides, step = [], 1
    for length in reversed(size):
        strides.append(step)
        step *= max(1, length)
    return tuple(reversed(strides))


def _small_tensor(data: bytearray, code: int, size: tuple[int, ...]) -> torch.Tensor:
    tensor = torch.frombuffer(data, dtype=_DTYPES[code])
    return tensor if len(size) == 1 else tensor.resize_(size)  # view() would make it one in autograd's eyes


def _alias(
    first: torch.Tensor, code: int, size: tuple[int, ...], stride: tuple[int, ...], offset: int, requires_grad: bool
) -> torch.Tensor:
    return _view(first.untyped_storage(), code, size, stride, offset, requires_grad)


def _whole_storage(storage: tuple[int, torch.UntypedStorage]) -> torch.UntypedStorage:
    return storage[1]


def _rebuild_tensor(
    storage: tuple[int, torch.UntypedStorage],
    code: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    offset: int,
    requires_grad: bool,
) -> torch.Tensor:
    low, memory = storage
    tensor = _NOTHING.new_empty(0, dtype=_DTYPES[code])
    tensor.set_(memory, offset - low // tensor.element_size(), size, stride)
    return tensor.requires_grad_() if requires_grad else tensor


def _rebuild_empty(
    storage: tuple[int, torch.UntypedStorage],
    code: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: bool,
) -> torch.Tensor:
    """A view of no elements: its place may lie outside of the extent that the other views of its storage use."""
    return _view(storage[1], code, size, stride, 0, requires_grad)


def _view(
    memory: torch.UntypedStorage,
    code: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    offset: int,
    requires_grad: bool,
) -> torch.Tensor:
    tensor = _NOTHING.new_empty(0, dtype=_DTYPES[code]).set_(memory, offset, size, stride)
    return tensor.requires_grad_() if requires_grad else tensor


def _reduce_subclass(tensor: torch.Tensor) -> Any:
    """As it reduces itself, but for its memory: that crosses as a plain tensor's, cut to its extent, and shared."""
    return torch_private.plain_within(tensor.__reduce_ex__(5))


class _Reducers:
    """multiprocessing's reducers, without torch's (those pass descriptors), then copyreg's, then ours. Looked up as
    they are asked for: there are dozens, few batches need one, and more may be registered at any time."""

    def __getitem__(self, kind: type) -> Callable[[Any], Any]:
        reducer = getattr(ForkingPickler, "_extra_reducers", {}).get(kind)
        if reducer is not None and not _is_torch(reducer):
            return reducer  # type: ignore[no-any-return]
        reducer = copyreg.dispatch_table.get(kind)
        if reducer is not None:
            return reducer
        if kind is np.ndarray:
            return _reduce_array
        if issubclass(kind, torch.Tensor):
            return _reduce_subclass
        raise KeyError(kind)


REDUCERS = _Reducers()


def _is_torch(reducer: Any) -> bool:
    return str(getattr(reducer, "__module__", "")).startswith("torch.multiprocessing")
