"""What a pickle says of things that are not made: names, records, and the modules and weights found in them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

_DEEPEST, _MOST, _LONGEST_NAME = 64, 100_000, 200  # modules inside of each other, tensors of one network
_MOST_PARTS, _LONGEST_KEY = 64, 2**16


class Refused(ValueError):
    """What a file asks for and does not get, as the end of a sentence."""


@dataclass(frozen=True, slots=True)
class Name:
    """A class or function that a pickle refers to: never imported."""

    module: str
    name: str


@dataclass(eq=False, repr=False, slots=True)
class Record:
    """What a pickle says of an object of a class that was not imported.

    `module` and `name` of the class or function, the `args` (and `kwargs`) it would have been called with, and the
    `state` it would have been given; `items`, what would have been appended to it or, as pairs, set in it.
    """

    module: str
    name: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    state: Any = None
    items: list[Any] = field(default_factory=list)

    def __repr__(self) -> str:
        return ascii(f"Record({self.module}.{self.name})"[:80])[1:-1]


def said(value: Any) -> str:
    """A value of a file in a message: strings and numbers as they are, at most 60 characters, others by their type."""
    if isinstance(value, Record):
        return repr(value)
    return ascii(value[:60] if isinstance(value, str) else value)[:70] if type(value) in (str, int) else _kind(value)


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"


def checked_key(value: Any) -> Any:
    """A key of a dict or set, if it is hashed and compared in no time: numbers, strings, small tuples of them."""
    pending, seen = [value], 0
    while pending:
        part = pending.pop()
        if type(part) in (tuple, frozenset):
            seen += len(part)
            if seen > _MOST_PARTS:
                raise Refused(f"a key has more than {_MOST_PARTS} parts")
            pending.extend(part)
        elif type(part).__hash__ is None or (isinstance(part, (str, bytes, memoryview)) and len(part) > _LONGEST_KEY):
            raise Refused(f"a {type(part).__name__} is no key, or a very long one")
    return value


def mapping_of(value: Any) -> dict[Any, Any] | None:
    """A dict, also where it was recorded as an object of a class derived from dict; None for anything else."""
    if isinstance(value, dict):
        return value
    if isinstance(value, Record):
        if value.items and all(isinstance(item, tuple) and len(item) == 2 for item in value.items):
            with contextlib.suppress(Refused):
                return {checked_key(key): item for key, item in value.items}
            return None
        if value.args and isinstance(value.args[0], dict):
            return value.args[0]
        if isinstance(value.state, dict):
            return value.state
    return None


def attributes_of(record: Any) -> dict[str, Any]:
    """The attributes of a recorded object: its state, or the state that a "persistent" class was called with.

    Raises ValueError for what has none.
    """
    state = record.state if isinstance(record, Record) else None
    if isinstance(state, tuple) and state and isinstance(state[0], dict):
        state = state[0]  # with slots beside
    if not isinstance(state, dict) and isinstance(record, Record) and record.args:
        state = mapping_of((mapping_of(record.args[0]) or {}).get("state"))  # the metadata of torch_utils.persistence
    if not isinstance(state, dict):
        raise ValueError(f"{said(record)} has no attributes: it is no recorded object with state")
    return state


def bounded(tensors: Iterable[Tensor]) -> None:
    """Raise ValueError if copies of the tensors took far more memory than they take as views of each other."""
    wanted, held = 0, {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        wanted += tensor.numel() * tensor.itemsize
        held[storage.data_ptr()] = storage.nbytes()
    if wanted > 4 * sum(held.values()) + 2**26:
        raise ValueError(f"it writes {sum(held.values()):,} bytes of tensors and means {wanted:,}")


def state_dict_of(record: Any) -> dict[str, Tensor]:
    """Parameters and persistent buffers of a recorded `torch.nn.Module` and its submodules, by their dotted names.

    Raises ValueError for anything that is no such module.
    """
    tensors: dict[str, Tensor] = {}
    for count, (name, value) in enumerate(_tensors(record, "", 0)):
        if count > _MOST:
            raise ValueError(f"{said(record)} names more than {_MOST:,} tensors")
        if value is not None:
            tensors[name] = value
    bounded(tensors.values())
    return tensors


def _tensors(record: Any, prefix: str, depth: int) -> Iterator[tuple[str, Tensor | None]]:
    if depth > _DEEPEST:
        raise ValueError(f"{said(record)} holds modules more than {_DEEPEST} deep")
    yield prefix, None  # a module counts as a name
    attributes = attributes_of(record)
    tables = [mapping_of(attributes.get(name) or {}) for name in ("_parameters", "_buffers", "_modules")]
    parameters, buffers, modules = (table if table is not None else {} for table in tables)
    if "_parameters" not in attributes or "_modules" not in attributes or None in tables:
        known = ", ".join(sorted(said(name)[1:-1] for name in list(attributes)[:100])[:8])
        raise ValueError(f"{said(record)} is no torch module: its attributes are {known}")
    transient = attributes.get("_non_persistent_buffers_set")
    transient = transient if isinstance(transient, set) else ()
    if any(not isinstance(name, str) or len(name) > _LONGEST_NAME for table in tables for name in table or ()):
        raise ValueError(f"{said(record)} has parts that are not named as those of a module")
    for name, value in (*parameters.items(), *buffers.items()):
        if isinstance(value, Tensor) and name not in transient:
            yield f"{prefix}{name}", value
    for name, child in modules.items():
        if child is not None:
            yield from _tensors(child, f"{prefix}{name}.", depth + 1)
