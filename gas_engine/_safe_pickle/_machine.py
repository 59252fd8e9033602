"""The stack machine of Python's pickles (protocols 0 to 5): bytes in, values out, within a budget.

Python's own unpickler takes its bounds from the file (a memo as long as an index says, bytes as many as a length
says); this one takes them from the size of the file.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ._literals import integer, latin1, long, quoted, short, unicode, utf8
from ._records import Name, Record, Refused, checked_key

_LARGE = 2**16


@dataclass
class Budget:
    """What the reading of one file may use, nested streams included: instructions, bytes beside those of the file, and
    numbers that its tensors have beyond those of their storages."""

    size: int
    opcodes: int = 2**24

    def __post_init__(self) -> None:
        self.bytes, self.expanded = 8 * self.size + 2**26, self.size + 2**24

    def take(self, count: int) -> None:
        """Account for `count` bytes that are about to be made from what was read already."""
        self.bytes -= count
        if self.bytes < 0:
            raise Refused(f"it unfolds into far more than its {self.size:,} bytes")


class Machine:
    """Reads one pickle of `data` from `position` on; `values` makes what is called, built and referred to."""

    def __init__(self, data: Any, values: Any, position: int = 0) -> None:
        self.data, self.values, self.budget, self.position = data, values, values.budget, position
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks below each mark
        self.memo: dict[int, Any] = {}
        self.unbuilt: dict[int, int] = {}  # where the memo holds what a state will replace

    def load(self) -> Any:
        """The value; `position` is behind it afterwards. Raises Refused or EOFError; other exceptions mean damage."""
        budget, data, end = self.budget, self.data, len(self.data)
        while True:
            if self.position >= end:
                raise EOFError
            budget.opcodes -= 1
            if budget.opcodes < 0:
                raise Refused("it has more instructions than any model or data set needs")
            opcode = data[self.position]
            self.position += 1
            if opcode == 0x2E:  # STOP
                return self.stack.pop()
            act = _ACTIONS.get(opcode)
            if act is None:
                raise Refused(f"0x{opcode:02x} is no instruction of a pickle that is read here")
            act(self)

    def take(self, count: int) -> bytes:
        if not 0 <= count <= len(self.data) - self.position:
            raise EOFError
        self.position += count
        return bytes(self.data[self.position - count : self.position])

    def blob(self, count: int) -> bytes | memoryview:
        """Bytes; where they are many, a view of the file, because the memo keeps them until the end."""
        if count <= _LARGE:
            return self.take(count)
        if count > len(self.data) - self.position:
            raise EOFError
        self.position += count
        return memoryview(self.data)[self.position - count : self.position].toreadonly()

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def line(self) -> bytes:
        end = self.data.find(b"\n", self.position)
        if end < 0:
            raise EOFError
        line = self.take(end - self.position)
        self.position += 1
        return line

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.since_mark()

    def popped(self, count: int) -> tuple[Any, ...]:
        items = tuple(self.stack[-count:])
        if len(items) < count:
            raise Refused("its instructions take more than they put down")
        del self.stack[-count:]
        return items

    def remember(self, index: int) -> None:
        value = self.memo[index] = self.stack[-1]
        if self.values.is_unbuilt(value):
            self.unbuilt[id(value)] = index

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise Refused("it refers to something that it does not hold")
        self.push(self.memo[index])

    def name(self, module: Any, name: Any) -> None:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise Refused("a class is named by something other than strings")
        self.push(self.values.find(module, name))

    def call(self, function: Any, args: Any, kwargs: Any = None) -> None:
        if not isinstance(args, tuple) or not isinstance(kwargs or {}, dict):
            raise Refused("it calls something without a tuple of arguments")
        if not isinstance(function, (Name, Record)):
            raise Refused(f"it calls a {type(function).__name__}")
        self.push(self.values.call(function, args, kwargs or {}))

    def build(self) -> None:
        target, state = self.popped(2)
        built = self.values.build(target, state)
        if built is not target:
            index = self.unbuilt.pop(id(target), None)
            if index is not None and self.memo.get(index) is target:
                self.memo[index] = built
        self.push(built)

    def append(self, items: list[Any] | tuple[Any, ...]) -> None:
        target = self.stack[-1]
        if isinstance(target, Record):
            target = target.items
        if type(target) is not list:
            raise Refused(f"it appends to a {type(target).__name__}")
        target.extend(items)

    def set_items(self, items: list[Any] | tuple[Any, ...]) -> None:
        target = self.stack[-1]
        pairs = zip(map(checked_key, items[::2]), items[1::2], strict=True)
        if isinstance(target, Record):
            target.items.extend(pairs)
        elif isinstance(target, dict):
            target.update(pairs)
        else:
            raise Refused(f"it sets items of a {type(target).__name__}")

    def add_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Record):
            target.items.extend(items)
        elif type(target) is set:
            target.update(map(checked_key, items))
        else:
            raise Refused(f"it adds items to a {type(target).__name__}")

    def empty_set(self) -> None:
        self.budget.take(200)
        self.push(set())

    def made(self, kind: Callable[[Any], Any]) -> None:
        items = self.since_mark()
        self.push(kind(items))

    def instance(self) -> None:
        module, name = self.line().decode(), self.line().decode()
        args = tuple(self.since_mark())
        self.call(self.values.find(module, name), args)

    def object(self) -> None:
        function, *args = self.since_mark()
        self.call(function, tuple(args))

    def persistent(self, key: Any) -> None:
        self.push(self.values.persistent(key))

    def protocol(self) -> None:
        version = self.number("B")
        if version > 5:
            raise Refused(f"it is of pickle protocol {version}, newer than 5")


def _dict(items: list[Any]) -> dict[Any, Any]:
    return dict(zip(map(checked_key, items[::2]), items[1::2], strict=True))


def _frozenset(items: list[Any]) -> frozenset[Any]:
    return frozenset(map(checked_key, items))


def _counted(form: str, kind: Callable[[bytes], Any]) -> Callable[[Machine], None]:
    return lambda m: m.push(kind(m.take(m.number(form))))


def _lined(kind: Callable[[bytes], Any]) -> Callable[[Machine], None]:
    return lambda m: m.push(kind(m.line()))


_ACTIONS: dict[int, Callable[[Machine], Any]] = {
    ord("("): Machine.mark,
    ord("0"): Machine.pop,
    ord("1"): Machine.since_mark,
    ord("2"): lambda m: m.push(m.stack[-1]),
    ord("F"): _lined(lambda line: float(short(line))),
    ord("I"): _lined(integer),
    ord("L"): _lined(lambda line: int(short(line).rstrip(b"L"))),
    ord("S"): _lined(quoted),
    ord("V"): _lined(unicode),
    ord("J"): lambda m: m.push(m.number("<i")),
    ord("K"): lambda m: m.push(m.number("B")),
    ord("M"): lambda m: m.push(m.number("<H")),
    ord("G"): lambda m: m.push(m.number(">d")),
    ord("N"): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    0x8A: _counted("B", long),
    0x8B: _counted("<i", long),
    ord("T"): _counted("<i", latin1),
    ord("U"): _counted("B", latin1),
    ord("X"): _counted("<I", utf8),
    0x8C: _counted("B", utf8),
    0x8D: _counted("<Q", utf8),
    ord("B"): lambda m: m.push(m.blob(m.number("<I"))),
    ord("C"): _counted("B", bytes),
    0x8E: lambda m: m.push(m.blob(m.number("<Q"))),
    0x96: _counted("<Q", bytearray),
    ord("]"): lambda m: m.push([]),
    ord("}"): lambda m: m.push({}),
    ord(")"): lambda m: m.push(()),
    0x8F: Machine.empty_set,
    ord("l"): lambda m: m.made(list),
    ord("d"): lambda m: m.made(_dict),
    ord("t"): lambda m: m.made(tuple),
    0x91: lambda m: m.made(_frozenset),
    0x85: lambda m: m.push(m.popped(1)),
    0x86: lambda m: m.push(m.popped(2)),
    0x87: lambda m: m.push(m.popped(3)),
    ord("a"): lambda m: m.append(m.popped(1)),
    ord("e"): lambda m: m.append(m.since_mark()),
    ord("s"): lambda m: m.set_items(m.popped(2)),
    ord("u"): lambda m: m.set_items(m.since_mark()),
    0x90: lambda m: m.add_items(m.since_mark()),
    ord("p"): lambda m: m.remember(int(short(m.line()))),
    ord("q"): lambda m: m.remember(m.number("B")),
    ord("r"): lambda m: m.remember(m.number("<I")),
    0x94: lambda m: m.remember(len(m.memo)),
    ord("g"): lambda m: m.recall(int(short(m.line()))),
    ord("h"): lambda m: m.recall(m.number("B")),
    ord("j"): lambda m: m.recall(m.number("<I")),
    ord("c"): lambda m: m.name(m.line().decode(), m.line().decode()),
    0x93: lambda m: m.name(*m.popped(2)),
    ord("R"): lambda m: m.call(*m.popped(2)),
    0x81: lambda m: m.call(*m.popped(2)),
    0x92: lambda m: m.call(*m.popped(3)),
    ord("i"): Machine.instance,
    ord("o"): Machine.object,
    ord("b"): Machine.build,
    ord("P"): lambda m: m.persistent(m.line().decode()),
    ord("Q"): lambda m: m.persistent(*m.popped(1)),
    0x80: Machine.protocol,
    0x95: lambda m: m.number("<Q"),  # FRAME: a hint for buffering
}
