"""Numbers and strings as pickles write them."""

from __future__ import annotations

import codecs

from ._records import Refused

_LONGEST_NUMBER = 1000  # digits or bytes: their conversion takes quadratic time


def long(data: bytes) -> int:
    return int.from_bytes(short(data), "little", signed=True)


def short(data: bytes) -> bytes:
    if len(data) > _LONGEST_NUMBER:
        raise Refused(f"a number has {len(data):,} digits")
    return data


def integer(line: bytes) -> int | bool:
    return {b"00": False, b"01": True}[line] if line in (b"00", b"01") else int(short(line))


def utf8(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def quoted(line: bytes) -> str:
    line = line.strip()
    if len(line) < 2 or line[0] != line[-1] or line[0] not in b"\"'":
        raise Refused("a string has no quotes")
    return codecs.escape_decode(line[1:-1])[0].decode("latin1")  # type: ignore[attr-defined]


def latin1(data: bytes) -> str:
    return data.decode("latin1")  # Python 2 strings, NumPy arrays among them


def unicode(line: bytes) -> str:
    return codecs.raw_unicode_escape_decode(line)[0]  # type: ignore[attr-defined]
