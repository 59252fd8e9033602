"""Third-party pickles read as data: nothing in them is imported or executed.

Tensors, NumPy arrays, numbers and containers come out as what they are; an instance of any other class, or a call of
any other function, becomes an inert `Record` of its name, arguments and state.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

__all__ = ["Record", "attributes_of", "read_pickle", "state_dict_of"]


class Record:
    """What a pickle says of an object of a class that was not imported.

    `module` and `name` of the class or function, the `args` (and `kwargs`) it would have been called with, and the
    `state` it would have been given; `items`, what would have been appended to it or set in it.
    """

    module: ClassVar[str] = ""
    name: ClassVar[str] = ""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    state: Any
    items: list[Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Record:
        record = super().__new__(cls)
        record.args, record.kwargs, record.state, record.items = args, kwargs, None, []
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def append(self, value: Any) -> None:
        self.items.append(value)

    def __repr__(self) -> str:
        return f"Record({self.module}.{self.name})"


def read_pickle(file: Path | str | IO[bytes]) -> Any:
    """Read a pickle of any protocol (Python's own format, not the zip files of torch.save) without executing it.

    Understood: None, numbers, strings, bytes, list, tuple, dict, set, OrderedDict, defaultdict; tensors and parameters
    of any device (which become CPU tensors; their storages are read with `weights_only`), torch dtypes, devices and
    sizes; NumPy arrays, scalars and dtypes. Anything else becomes a `Record`.
    Raises ValueError, with the file's name, for a file that is missing, truncated, or no pickle.

        snapshot = read_pickle("network-snapshot.pkl")
        weights = state_dict_of(snapshot["D"])
    """
    name = getattr(file, "name", "") if hasattr(file, "read") else file
    try:
        data = file.read() if hasattr(file, "read") else Path(file).read_bytes()  # type: ignore[union-attr,arg-type]
    except OSError as error:
        raise ValueError(f"cannot read the pickle {name}: {error}") from None
    if data[:2] == b"PK":
        raise ValueError(
            f"{name} is a zip file of torch.save, no bare pickle: torch.load(..., weights_only=True) reads it"
        )
    try:
        return _Reader(io.BytesIO(data)).load()
    except EOFError:
        raise ValueError(f"the pickle {name} is truncated or empty: it ends after {len(data)} bytes") from None
    except Exception as error:  # a damaged pickle fails in any way
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"cannot read the pickle {name}: {said[0]}; is it damaged, or no pickle at all?") from None


class _Reader(pickle.Unpickler):
    """Resolves names to bound methods and built-in types, neither of which a pickle can change, or to records."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, encoding="latin1")  # Python 2 strings, NumPy arrays among them
        self.records: dict[tuple[str, str], type[Record]] = {}
        self.known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("collections", "defaultdict"): defaultdict,
            ("copyreg", "_reconstructor"): self._reconstruct,
            ("_codecs", "encode"): self._encode,
            ("torch", "Size"): torch.Size,
            ("torch", "device"): torch.device,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): self._parameter,
            ("torch.storage", "_load_from_bytes"): self._storage,
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
        }
        for kind in (list, dict, set, frozenset, tuple, complex, object):
            self.known["builtins", kind.__name__] = kind
        for core in ("numpy.core", "numpy._core"):
            self.known[f"{core}.multiarray", "_reconstruct"] = self._array
            self.known[f"{core}.multiarray", "scalar"] = self._scalar
            self.known[f"{core}.numeric", "_frombuffer"] = self._from_buffer

    def find_class(self, module: str, name: str) -> Any:
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
        if (module, name) in self.known:
            return self.known[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) not in self.records:
            self.records[module, name] = type(name, (Record,), {"module": module, "name": name})
        return self.records[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise ValueError(f"it refers to data outside of itself ({pid!r:.60})")

    def _reconstruct(self, kind: Any, base: Any, state: Any) -> Any:
        if not (isinstance(kind, type) and issubclass(kind, Record)):
            raise ValueError(f"copyreg makes no {kind!r:.60}")
        return kind() if state is None else kind(state)

    def _encode(self, text: str, encoding: str = "latin1") -> bytes:
        if encoding not in ("latin1", "latin-1"):
            raise ValueError(f"bytes are written as latin1, not {encoding!r:.60}")
        return text.encode("latin1")

    def _storage(self, data: bytes) -> Any:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)

    def _tensor(self, storage: Any, offset: int, size: Any, stride: Any, *rest: Any) -> Tensor:
        if not isinstance(storage, torch.storage.TypedStorage):
            raise ValueError(f"a tensor's storage is {type(storage).__name__}")
        count = storage._untyped_storage.nbytes() // storage.dtype.itemsize
        reach = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1
        if min((offset, *size, *stride)) < 0 or (0 not in size and reach > count):
            raise ValueError(f"a tensor of size {tuple(size)} reaches outside of its storage of {count} numbers")
        return torch._utils._rebuild_tensor_v2(storage, offset, size, stride, False, OrderedDict())

    def _parameter(self, data: Any, *rest: Any) -> Tensor:
        if not isinstance(data, Tensor):
            raise ValueError(f"a parameter's data is {type(data).__name__}")
        return data

    def _array(self, kind: Any, shape: Any, typecode: Any) -> Any:
        if kind is not np.ndarray:
            raise ValueError(f"NumPy makes no {kind!r:.60}")
        return np.ndarray((0,), "b")  # its state follows

    def _scalar(self, dtype: Any, data: bytes = b"") -> Any:
        if not isinstance(dtype, np.dtype) or dtype.hasobject:
            raise ValueError(f"a NumPy number of type {dtype!r:.60}")
        data = data.encode("latin1") if isinstance(data, str) else data
        return np.frombuffer(data, dtype, 1)[0]

    def _from_buffer(self, data: Any, dtype: np.dtype, shape: Any, order: str) -> Any:
        return np.frombuffer(data, dtype).reshape(shape, order=order)  # type: ignore[call-overload]


def attributes_of(record: Any) -> dict[str, Any]:
    """The attributes of a recorded object: its state, or the state that a "persistent" class was called with."""
    state = record.state if isinstance(record, Record) else None
    if isinstance(state, tuple) and state and isinstance(state[0], dict):
        state = state[0]  # with slots beside
    if not isinstance(state, dict) and isinstance(record, Record) and record.args and isinstance(record.args[0], dict):
        state = record.args[0].get("state")  # the metadata that torch_utils.persistence writes
    if not isinstance(state, dict):
        raise ValueError(
            f"{record!r:.80} has no attributes: it is {type(record).__name__}, no recorded object with state"
        )
    return state


def state_dict_of(record: Any) -> dict[str, Tensor]:
    """Parameters and persistent buffers of a recorded `torch.nn.Module` and its submodules, by their dotted names.

    Raises ValueError for anything that is no such module.
    """
    return dict(_tensors(record, ""))


def _tensors(record: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    attributes = attributes_of(record)
    if "_parameters" not in attributes or "_modules" not in attributes:
        raise ValueError(f"{record!r:.80} is no torch module: its attributes are {', '.join(sorted(attributes)[:8])}")
    transient = attributes.get("_non_persistent_buffers_set") or ()
    for name, value in (*attributes["_parameters"].items(), *(attributes.get("_buffers") or {}).items()):
        if isinstance(value, Tensor) and name not in transient:
            yield prefix + name, value
    for name, child in attributes["_modules"].items():
        if child is not None:
            yield from _tensors(child, f"{prefix}{name}.")
