"""Third-party pickles read as data: nothing in them is imported or executed.

Tensors, NumPy arrays, numbers and containers come out as what they are; an instance of any other class, or a call of
any other function, becomes an inert `Record` of its name, arguments and state.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import IO, Any

from ._containers import Reader
from ._records import Name, Record, Refused, attributes_of, bounded, mapping_of, said, state_dict_of

__all__ = ["Name", "Record", "attributes_of", "bounded", "mapping_of", "read_pickle", "said", "state_dict_of"]


def read_pickle(file: Path | str | IO[bytes]) -> Any:
    """Read a pickle of any protocol, or a file of torch.save (zip or the older stream), without executing it.

    Understood: None, numbers, strings, bytes, list, tuple, dict, set, OrderedDict, defaultdict; tensors and parameters
    of any device, which become CPU tensors; torch dtypes, devices and sizes; NumPy arrays, scalars and dtypes. A class
    or function that is only named becomes a `Name`, anything else a `Record`.
    Bytes beyond 64 KiB stay a memoryview of the file.
    Memory: the tensors of a zip file are mapped and stay on the disk until they are used, those of other files are
    copied out of a map of the file. At most 2^24 instructions are followed, and little is made beyond that.
    Raises ValueError, one sentence with the file's name, for a file that is missing, truncated, damaged, hostile, or no
    such file.

        snapshot = read_pickle("network-snapshot.pkl")
        weights = state_dict_of(snapshot["D"])
    """
    name = getattr(file, "name", "") if hasattr(file, "read") else file
    try:
        return Reader(_content(file)).read()
    except EOFError:
        reason = "it is truncated or empty"
    except OSError as error:
        reason = error.strerror or type(error).__name__
    except Refused as error:
        reason = str(error)
    except MemoryError:
        reason = "it asks for more memory than there is"
    except Exception as error:  # a damaged pickle fails in any way
        seen = (ascii(str(error))[1:-1].split("\\n") or [""])[0][:80]
        reason = f"is it damaged, or no pickle at all? ({type(error).__name__}: {seen})"
    raise ValueError(f"cannot read the pickle {name}: {reason}")


def _content(file: Path | str | IO[bytes]) -> Any:
    """The bytes, writable for PyTorch's sake; those of a file are a private map of it."""
    if not isinstance(file, (str, Path)):
        return bytearray(file.read())
    with open(file, "rb") as opened:
        if opened.seek(0, 2) == 0:
            raise EOFError
        return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
