"""Where torch.save puts the numbers: zip files (``archive/data.pkl``, ``archive/data/N``) and the older stream."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import torch

from ._machine import Budget, Machine
from ._records import Refused, said
from ._values import Storage, Values

_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001
_DEEPEST = 2  # a pickle holds streams of storages, which hold none
_MOST_RECORDS = 200_000


@dataclass(frozen=True)
class _Span:
    start: int
    size: int


class Reader:
    """Reads a pickle, a stream or a zip file of torch.save in `data`, and those nested in it, on one budget."""

    def __init__(self, data: Any, budget: Budget | None = None, depth: int = 0) -> None:
        self.data, self.budget, self.depth = data, budget or Budget(len(data)), depth
        self.storages: dict[Any, Storage] = {}

    def read(self) -> Any:
        if self.depth > _DEEPEST:
            raise Refused("it nests streams of torch.save in each other")
        if self.data[:4] == b"PK\x03\x04":
            return self._zip()
        value, position = self._pickle(0)
        return self._stream(position) if type(value) is int and value == _MAGIC else value

    def _nested(self, data: Any) -> Any:
        return Reader(bytearray(data), self.budget, self.depth + 1).read()

    def _pickle(self, position: int, stored: Any = None) -> tuple[Any, int]:
        machine = Machine(self.data, Values(self.budget, self._nested, stored), position)
        return machine.load(), machine.position

    def _stream(self, position: int) -> Any:
        version, position = self._pickle(position)
        if version != _VERSION:
            raise Refused(f"it is of version {said(version)} of torch.save, not {_VERSION}")
        system, position = self._pickle(position)
        if isinstance(system, dict) and system.get("little_endian") is False:
            raise Refused("it was written by a big-endian machine")
        value, position = self._pickle(position, self._promised)
        keys, position = self._pickle(position)
        if not isinstance(keys, list) or len(keys) != len(self.storages):
            raise Refused("its list of storages is not complete")
        for key in keys:
            storage = self.storages.pop(key) if isinstance(key, str) and key in self.storages else None
            if storage is None:
                raise Refused("its list of storages names an unknown one")
            (count,) = struct.unpack("<q", self.data[position : position + 8].ljust(8, b"\xff"))
            if count * storage.dtype.itemsize != len(storage.bytes):
                raise Refused(f"a storage of {len(storage.bytes)} bytes is announced as {said(count)} numbers")
            if position + 8 + len(storage.bytes) > len(self.data):
                raise EOFError
            if count:
                content = torch.frombuffer(self.data, dtype=torch.uint8, count=len(storage.bytes), offset=position + 8)
                storage.bytes.copy_(content)
            position += 8 + len(storage.bytes)
        return value

    def _promised(self, dtype: torch.dtype, key: str, count: int, view: Any) -> Storage:
        """A storage whose bytes come behind the pickle."""
        if view is not None:
            raise Refused("it holds views of storages, as PyTorch before 0.4 wrote them")
        size = count * dtype.itemsize
        if key not in self.storages:
            if size + sum(len(storage.bytes) for storage in self.storages.values()) > len(self.data):
                raise EOFError
            self.storages[key] = Storage(torch.empty(size, dtype=torch.uint8), dtype)
        storage = self.storages[key]
        if size > len(storage.bytes) or dtype != storage.dtype:
            raise Refused(f"its storage {said(key)} is too short, or of two types")
        return storage

    def _zip(self) -> Any:
        records = _directory(self.data)
        pickles = [name for name in records if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise Refused("it is a zip file without one data.pkl, hence none of torch.save")
        root = pickles[0].removesuffix("data.pkl")
        order = records.get(f"{root}byteorder")
        if order is not None and bytes(self.data[order.start : order.start + min(order.size, 16)]) != b"little":
            raise Refused("it was written by a big-endian machine")

        def stored(dtype: torch.dtype, key: str, count: int, view: Any) -> Storage:
            span, size = records.get(f"{root}data/{key}"), count * dtype.itemsize
            if span is None or span.size < size:
                raise Refused(f"its storage {said(key)} is missing or too short")
            if (key, dtype) not in self.storages:
                self.storages[key, dtype] = Storage(self._mapped(span), dtype)
            return self.storages[key, dtype]

        span = records[pickles[0]]
        self.budget.take(span.size)
        content = bytearray(self.data[span.start : span.start + span.size])
        return Machine(content, Values(self.budget, self._nested, stored)).load()

    def _mapped(self, span: _Span) -> torch.Tensor:
        """The bytes in place; a file on the disk stays there until they are used. Unaligned ones are copied."""
        if span.size == 0:
            return torch.empty(0, dtype=torch.uint8)
        found = torch.frombuffer(self.data, dtype=torch.uint8, count=span.size, offset=span.start)
        if found.data_ptr() % 16 == 0:
            return found
        self.budget.take(span.size)
        return found.clone()


def _directory(data: Any) -> dict[str, _Span]:
    """Where the records of a zip file lie. Refused are compressed, repeated and overlong ones."""
    end = data.rfind(b"PK\x05\x06", max(0, len(data) - 65557))
    if end < 0 or end + 22 > len(data):
        raise EOFError
    count, size, start = struct.unpack("<10xHII2x", data[end : end + 22])
    if data[max(0, end - 20) : max(0, end - 16)] == b"PK\x06\x07":
        (there,) = struct.unpack("<8xQ4x", data[end - 20 : end])
        if data[there : there + 4] == b"PK\x06\x06":
            count, size, start = struct.unpack("<32xQQQ", data[there : there + 56])
    if count > _MOST_RECORDS:
        raise Refused(f"it is a zip file of {count:,} records")
    if start + size > end:
        raise Refused("the directory of the zip file lies outside of it")
    records: dict[str, _Span] = {}
    for _ in range(count):
        if start + 46 > end or data[start : start + 4] != b"PK\x01\x02":
            raise Refused("the directory of the zip file is damaged")
        flags, method, packed, plain, name_size, extra_size, comment, header = struct.unpack(
            "<8xHH8xIIHHH8xI", data[start : start + 46]
        )
        name = bytes(data[start + 46 : start + 46 + name_size]).decode("utf-8", "replace")
        extra = bytes(data[start + 46 + name_size : start + 46 + name_size + extra_size])
        plain, packed, header = _wide(extra, plain, packed, header)
        start += 46 + name_size + extra_size + comment
        if method != 0 or plain != packed or flags & 1:
            raise Refused(f"its record {said(name)} is compressed or encrypted, which torch.save never does")
        if name in records:
            raise Refused(f"it has two records {said(name)}")
        if data[header : header + 4] != b"PK\x03\x04" or header + 30 > end:
            raise Refused(f"its record {said(name)} is not where the directory says")
        skip = sum(struct.unpack("<26xHH", data[header : header + 30]))
        records[name] = _Span(header + 30 + skip, plain)
        if header + 30 + skip + plain > end:
            raise EOFError
    return records


def _wide(extra: bytes, *numbers: int) -> list[int]:
    """Sizes and offset, from the zip64 field where they do not fit into 32 bits."""
    wide: list[int] = []
    while len(extra) >= 4:
        kind, size = struct.unpack("<HH", extra[:4])
        if kind == 1:
            size -= size % 8
            wide = list(struct.unpack(f"<{size // 8}Q", extra[4 : 4 + size]))
        extra = extra[4 + size :]
    return [wide.pop(0) if n == 0xFFFFFFFF and wide else n for n in numbers]
