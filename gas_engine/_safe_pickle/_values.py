"""The few calls of a pickle that are answered: containers, tensors, NumPy arrays. All others become records."""

from __future__ import annotations

import math
import re
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._machine import Budget
from ._records import Name, Record, Refused, checked_key, said

_PLAIN_DTYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248]|c8|c16|[SU][1-9]\d{0,5})")
_OLD_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg", "numpy._core": "numpy.core"}
_BYTES = (bytes, bytearray, memoryview)
_STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8, "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128,
}  # fmt: skip


@dataclass(eq=False, repr=False)
class Storage:
    """Bytes [n] uint8 that tensors view, and the type of number that they were saved as."""

    bytes: Tensor
    dtype: torch.dtype
    viewed: int = 0

    def view(self, numbers: int) -> int:
        """By how many numbers a further tensor of so many takes its tensors beyond its size."""
        count = len(self.bytes) // self.dtype.itemsize
        before, self.viewed = self.viewed, self.viewed + numbers
        return max(0, self.viewed - count) - max(0, before - count)


@dataclass(eq=False, repr=False)
class Unbuilt:
    """A NumPy array or dtype whose state is still to come."""

    dtype: np.dtype | None = None


class Values:
    """Answers a `Machine`: names are looked up in a table and nowhere else.

    `nested(bytes)` reads the stream of torch.save inside of a pickle, `stored(dtype, key, count, view)` finds a storage
    outside of it.
    """

    def __init__(self, budget: Budget, nested: Callable[[Any], Any], stored: Callable[..., Storage] | None) -> None:
        self.budget, self.nested, self.stored = budget, nested, stored
        self.names: dict[tuple[str, str], Any] = {}

    def find(self, module: str, name: str) -> Any:
        """A torch dtype, or the bare name."""
        for old, new in _OLD_MODULES.items():
            if module == old or module.startswith(old + "."):
                module = new + module[len(old) :]
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        return self.names.setdefault((module, name), Name(module, name))

    def call(self, function: Name | Record, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        answer = _ANSWERS.get((function.module, function.name)) if isinstance(function, Name) else None
        if answer is None:
            return Record(function.module, function.name, args, kwargs)
        return answer(self, *args, **kwargs)

    def is_unbuilt(self, value: Any) -> bool:
        return type(value) is Unbuilt

    def build(self, target: Any, state: Any) -> Any:
        """The object with its state: itself, or what the state makes of it. States of containers are left out."""
        if isinstance(target, Record):
            target.state = state
            return target
        if isinstance(target, Unbuilt):
            return self._array(state) if target.dtype is None else self._ordered_dtype(target.dtype, state)
        if isinstance(target, (dict, Tensor)):
            return target
        raise Refused(f"it gives a state to a {type(target).__name__}")

    def persistent(self, key: Any) -> Any:
        if self.stored is None:
            raise Refused(f"it refers to data outside of itself ({said(key)})")
        if isinstance(key, tuple) and len(key) == 4 and key[0] == "module":
            return key[1]  # a class, beside its source code
        if not isinstance(key, tuple) or len(key) not in (5, 6) or key[0] != "storage":
            raise Refused("it refers to something outside of itself that is no storage")
        dtype = _STORAGES.get(getattr(key[1], "name", ""))
        if dtype is None or not isinstance(key[2], str) or not _counts(key[4]):
            raise Refused(f"a storage is of the unknown type {said(getattr(key[1], 'name', key[1]))}")
        return self.stored(dtype, key[2], key[4], key[5] if len(key) == 6 else None)

    def ordered(self, pairs: Any = ()) -> OrderedDict[Any, Any]:
        return OrderedDict(self._pairs(pairs))

    def default(self, factory: Any = None, pairs: Any = ()) -> defaultdict[Any, Any]:
        kinds: dict[str, Any] = {"list": list, "dict": dict, "set": set, "int": int, "float": float, "str": str}
        kind = kinds.get(factory.name) if isinstance(factory, Name) and factory.module == "builtins" else None
        return defaultdict(kind, self._pairs(pairs))

    def _pairs(self, pairs: Any) -> list[tuple[Any, Any]]:
        pairs = list(pairs.items()) if isinstance(pairs, dict) else self._items(pairs)
        self.budget.take(100 * len(pairs))
        return [(checked_key(key), value) for key, value in pairs]

    def _items(self, items: Any) -> list[Any]:
        if not isinstance(items, (list, tuple, set, frozenset)):
            raise Refused(f"it makes a container of a {type(items).__name__}")
        self.budget.take(100 * len(items))
        return list(items)

    def container(self, kind: type, items: Any = ()) -> Any:
        return kind(map(checked_key, self._items(items))) if kind in (set, frozenset) else kind(self._items(items))

    def bytes(self, kind: type, text: Any = b"", encoding: Any = "latin1") -> Any:
        if not isinstance(text, (*_BYTES, str)) or encoding not in ("latin1", "latin-1"):
            raise Refused(f"it makes {kind.__name__} of a {type(text).__name__}")
        self.budget.take(len(text))
        return kind(text.encode("latin1") if isinstance(text, str) else text)

    def complex(self, real: Any = 0.0, imaginary: Any = 0.0) -> complex:
        if not all(type(part) in (int, float) for part in (real, imaginary)):
            raise Refused("a complex number is made of something other than numbers")
        return complex(real, imaginary)

    def reconstructor(self, kind: Any, base: Any, state: Any) -> Record:
        if not isinstance(kind, Name):
            raise Refused("copyreg makes an object of no class")
        return Record(kind.module, kind.name, () if state is None else (state,))

    def device(self, kind: Any, index: Any = None) -> torch.device:
        if not isinstance(kind, str) or len(kind) > 20 or not (index is None or type(index) is int):
            raise Refused(f"{said(kind)} is no device")
        return torch.device(kind) if index is None else torch.device(kind, index)

    def size(self, sizes: Any = ()) -> torch.Size:
        if not isinstance(sizes, (tuple, list)) or len(sizes) > 25 or not _counts(*sizes):
            raise Refused("a torch.Size is made of something other than numbers")
        return torch.Size(sizes)

    def storage(self, data: Any) -> Storage:
        if not isinstance(data, _BYTES):
            raise Refused(f"a storage is made of a {type(data).__name__}")
        self.budget.take(2 * len(data))
        storage = self.nested(data)
        if not isinstance(storage, Storage):
            raise Refused(f"a storage is a {type(storage).__name__}")
        return storage

    def tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Tensor:
        if not isinstance(storage, Storage):
            raise Refused(f"a tensor's storage is a {type(storage).__name__}")
        if not (isinstance(size, tuple) and isinstance(stride, tuple) and _counts(offset, *size, *stride)):
            raise Refused("a tensor's size and strides are no numbers")
        if len(size) != len(stride) or len(size) > 25:
            raise Refused(f"a tensor has {len(size)} dimensions and {len(stride)} strides")
        count = len(storage.bytes) // storage.dtype.itemsize
        reach = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1
        if offset > count or (0 not in size and reach > count):
            raise Refused(f"a tensor of size {list(size)} reaches outside of its storage of {count} numbers")
        self.budget.expanded -= storage.view(math.prod(size))
        if self.budget.expanded < 0:
            raise Refused(f"its tensors, one of them of size {list(size)}, have far more numbers than are written")
        return torch.empty(0, dtype=storage.dtype).set_(storage.bytes.untyped_storage(), offset, size, stride)

    def tensor_of_dtype(
        self, storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any
    ) -> Tensor:
        if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype):
            raise Refused("a tensor has no storage or no type")
        return self.tensor(Storage(storage.bytes, dtype), offset, size, stride)

    def parameter(self, data: Any, *rest: Any) -> Tensor:
        if not isinstance(data, Tensor):
            raise Refused(f"a parameter's data is a {type(data).__name__}")
        return data

    def typed(self, function: Any, kind: Any, args: Any, state: Any) -> Any:
        """A tensor with attributes, which are left out."""
        if not isinstance(function, Name) or not isinstance(args, tuple):
            raise Refused("a tensor is rebuilt by no function")
        return self.call(function, args, {})

    def dtype(self, text: Any, *rest: Any) -> Any:
        if not isinstance(text, str) or not _PLAIN_DTYPE.fullmatch(text):
            return Record("numpy", "dtype", (text, *rest))
        return Unbuilt(np.dtype(text))

    def _ordered_dtype(self, dtype: np.dtype, state: Any) -> np.dtype:
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", ">", "|", "="):
            raise Refused("a NumPy type has no byte order")
        return dtype.newbyteorder(state[1])

    def unbuilt_array(self, *args: Any) -> Unbuilt:
        return Unbuilt()

    def _array(self, state: Any) -> Any:
        if not isinstance(state, tuple) or len(state) != 5:
            raise Refused("a NumPy array has no state")
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, np.dtype) or not isinstance(data, (*_BYTES, str)):
            return Record("numpy", "ndarray", state=state)  # of objects
        return self.array(data, dtype, shape, "F" if fortran else "C")

    def array(self, data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
        if not isinstance(dtype, np.dtype) or not isinstance(data, (*_BYTES, str)) or order not in ("C", "F"):
            raise Refused(f"a NumPy array is made of a {type(data).__name__}")
        shape = shape if isinstance(shape, tuple) else (shape,)
        if not _counts(*shape) or len(shape) > 32:
            raise Refused("a NumPy array has no shape")
        data = data.encode("latin1") if isinstance(data, str) else data
        if math.prod(shape) * dtype.itemsize != len(data):
            raise Refused(f"a NumPy array of shape {list(shape)} is written as {len(data)} bytes")
        self.budget.take(len(data))
        return np.frombuffer(data, dtype).reshape(shape, order=order).copy(order)  # type: ignore[call-overload]

    def scalar(self, dtype: Any, data: Any = b"") -> Any:
        if not isinstance(dtype, np.dtype):
            return Record("numpy", "generic", (dtype, data))
        return self.array(data, dtype, (1,), "C")[0]


def _counts(*numbers: Any) -> bool:
    return all(type(n) is int and 0 <= n < 2**62 for n in numbers)


_ANSWERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): Values.ordered,
    ("collections", "defaultdict"): Values.default,
    ("copyreg", "_reconstructor"): Values.reconstructor,
    ("_codecs", "encode"): lambda values, *args: values.bytes(bytes, *args),
    ("builtins", "bytes"): lambda values, *args: values.bytes(bytes, *args),
    ("builtins", "bytearray"): lambda values, *args: values.bytes(bytearray, *args),
    ("builtins", "complex"): Values.complex,
    ("builtins", "dict"): lambda values, *args: dict(values.ordered(*args)),
    ("builtins", "list"): lambda values, *args: values.container(list, *args),
    ("builtins", "tuple"): lambda values, *args: values.container(tuple, *args),
    ("builtins", "set"): lambda values, *args: values.container(set, *args),
    ("builtins", "frozenset"): lambda values, *args: values.container(frozenset, *args),
    ("torch", "device"): Values.device,
    ("torch", "Size"): Values.size,
    ("torch._utils", "_rebuild_tensor"): Values.tensor,
    ("torch._utils", "_rebuild_tensor_v2"): Values.tensor,
    ("torch._utils", "_rebuild_tensor_v3"): Values.tensor_of_dtype,
    ("torch._utils", "_rebuild_parameter"): Values.parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): Values.parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): Values.typed,
    ("torch.storage", "_load_from_bytes"): Values.storage,
    ("numpy", "dtype"): Values.dtype,
    ("numpy.core.multiarray", "_reconstruct"): Values.unbuilt_array,
    ("numpy.core.multiarray", "scalar"): Values.scalar,
    ("numpy.core.numeric", "_frombuffer"): Values.array,
}
