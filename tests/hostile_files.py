"""Files that mean harm: 60 made by hand, and valid seeds of every format to be mutated."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator

import torch
from published import dumps, edm_record, student, teacher_set
from safetensors.torch import save
from torch import nn

from gas_engine import GeneralizedSolver, Schedule
from gas_engine.adapters.edm import save_edm
from gas_engine.networks import R3GANDiscriminator, build_edm
from gas_engine.solvers.files import save_solver

TINY = {
    "img_resolution": 4, "img_channels": 1, "label_dim": 0, "model_type": "SongUNet", "model_channels": 4,
    "channel_mult": [1], "channel_mult_emb": 1, "num_blocks": 0, "attn_resolutions": [],
}  # fmt: skip


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def data(value: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(value)) + value


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def call(function: bytes, *args: bytes) -> bytes:
    return function + b"(" + b"".join(args) + b"tR"


def pickled(*parts: bytes) -> bytes:
    return b"\x80\x04" + b"".join(parts) + b"."


def nested(levels: int, lowest: bytes, twice: bytes) -> bytes:
    """`levels` containers, each of twice the one below."""
    return lowest + b"q\x00" + b"".join(twice + b"q\x00" for _ in range(levels))


def saved(value: object, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def zipped(records: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        for record, content in records:
            file.writestr(record, content)
    return buffer.getvalue()


def with_header(header: object, tail: bytes = b"", length: int | None = None) -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded + tail


def tensor(size: bytes, stride: bytes, offset: int = 0) -> bytes:
    storage = call(name("torch.storage", "_load_from_bytes"), data(_STORAGE))
    return call(name("torch._utils", "_rebuild_tensor_v2"), storage, number(offset), size, stride, b"\x89", b"}")


_STORAGE = pickle.dumps(torch.zeros(4), 3)
_STORAGE = _STORAGE[_STORAGE.index(b"\x80\x02\x8a\x0al\xfc") :]


def executions(target: str) -> Iterator[tuple[str, bytes]]:
    """Pickles that would run something; as records they are harmless values."""
    touch = text(f"touch {target}")
    code = text(f"open({target!r}, 'w')")
    system = name("os", "system")
    yield "system", pickled(call(system, touch))
    yield "stack-global", pickled(text("posix"), text("system"), b"\x93", b"(", touch, b"tR")
    yield "eval", pickled(call(name("builtins", "eval"), code))
    yield "exec-python2", b"(" + b"S" + repr(f"open({target!r}, 'w')").encode() + b"\ni__builtin__\nexec\n."
    yield "object", pickled(b"(", name("subprocess", "Popen"), touch, b"\x88o")
    yield "new-object", pickled(name("subprocess", "Popen"), b"(", touch, b"t\x81")
    yield "new-object-with-names", pickled(name("subprocess", "Popen"), b")", b"}", text("args"), touch, b"s\x92")
    module = call(name("builtins", "__import__"), text("os"))
    yield "getattr-chain", pickled(call(call(name("builtins", "getattr"), module, text("system")), touch))
    yield "dotted", pickled(text("gas_engine.files"), text("os.system"), b"\x93", b"(", touch, b"tR")
    yield "map", pickled(call(name("builtins", "list"), b"(" + call(name("builtins", "map"), system) + b"t"))
    yield "state", pickled(name("os", "system"), b")R", b"}", text("__class__"), system, b"sb")
    yield "reconstructor", pickled(call(name("copyreg", "_reconstructor"), system, name("builtins", "object"), touch))
    inner = pickled(call(system, touch))
    yield "nested", pickled(call(name("torch.storage", "_load_from_bytes"), data(inner)))
    yield "torch-load", pickled(call(name("torch", "load"), data(inner)))
    yield (
        "typed-tensor",
        pickled(
            call(
                name("torch._tensor", "_rebuild_from_type_v2"),
                system,
                name("torch", "Tensor"),
                b"(" + touch + b"t",
                b"N",
            )
        ),
    )
    yield "zip", zipped([("archive/data.pkl", inner), ("archive/version", b"3")])
    yield "persistent", zipped([("archive/data.pkl", pickled(b"(", text("storage"), system, touch, b"tQ"))])
    yield "default-factory", pickled(call(name("collections", "defaultdict"), system))
    yield "torch-jit", zipped([("archive/data.pkl", b"\x80\x02N."), ("archive/code/__torch__.py", b"raise SystemExit")])


def bombs() -> Iterator[tuple[str, bytes]]:
    """Pickles that ask for memory, time or depth."""
    yield "memo", pickled(b"Nr\xff\xff\xff\xff")
    yield "memo-text", b"Np" + str(10**18).encode() + b"\n."
    for code, size in ((b"\x8e", 2**62), (b"\x96", 2**40), (b"\x8d", 2**63), (b"B", 2**31)):
        yield f"length-{code.hex()}", pickled(code + struct.pack("<Q" if size > 2**32 else "<I", size))
    yield "long-4", pickled(b"\x8b\xff\xff\xff\x7f")
    yield "long-negative", pickled(b"\x8b\xff\xff\xff\xff")
    yield "long-large", pickled(b"\x8b" + struct.pack("<i", 10**6) + b"\x7f" * 10**6)
    yield "digits", b"I" + b"9" * 10**6 + b"\n."
    yield "digits-long", b"L" + b"9" * 10**6 + b"L\n."
    yield "index", b"Ng" + b"9" * 10**6 + b"\n."
    yield "deep-lists", pickled(b"]" * 100_000 + b"a" * 99_999)
    yield "deep-tuples", pickled(b"N" + b"\x85" * 100_000)
    yield "deep-dicts", pickled(b"}N" * 50_000 + b"N" + b"s" * 50_000)
    yield "marks", pickled(b"(" * 100_000)
    yield "laughs", pickled(nested(100, b"]", b"h\x00h\x00\x86"))
    yield "laughs-key", pickled(nested(100, b")", b"h\x00h\x00\x86"), b"}h\x00Ns")
    yield "laughs-set", pickled(call(name("builtins", "set"), b"(" + nested(60, b")", b"h\x00h\x00\x86") + b"t"))
    yield "laughs-frozen", pickled(nested(60, b")", b"(h\x00h\x00\x86N\x91"))
    yield "range", pickled(call(name("builtins", "list"), call(name("builtins", "range"), number(10**12))))
    yield "bytes", pickled(call(name("builtins", "bytes"), number(10**12)))
    yield "bytearray", pickled(call(name("builtins", "bytearray"), number(10**12)))
    once = name("_codecs", "encode") + b"q\x00" + text("x" * 2**20) + text("latin1") + b"\x86q\x01"
    yield "copies", pickled(once + b"h\x00h\x01R" * 10_000)
    yield "sets", pickled(b"\x8f" * 400_000)
    storage = name("torch.storage", "_load_from_bytes") + b"q\x00" + data(_STORAGE + b"\x00" * 2**20) + b"\x85q\x01"
    yield "storages", pickled(storage + b"h\x00h\x01R" * 1_000)
    inner = pickled(b"N")
    for _ in range(20):
        inner = pickled(call(name("torch.storage", "_load_from_bytes"), data(inner)))
    yield "matryoshka", inner
    dtype = call(name("numpy", "dtype"), text("f8"), b"\x89", b"\x88")
    dtype += b"(K\x03" + text("<") + b"NNN" + number(-1) + number(-1) + b"K\x00tb"
    array = call(name("numpy.core.multiarray", "_reconstruct"), name("numpy", "ndarray"), b"K\x00\x85", data(b"b"))
    yield "array", pickled(array, b"(K\x01", numbers(2**61, 8), dtype, b"\x89", data(b"x" * 8), b"tb")
    yield "array-negative", pickled(array, b"(K\x01", numbers(-1, -1), dtype, b"\x89", data(b"x" * 8), b"tb")
    yield "structured", pickled(call(name("numpy", "dtype"), text("(1000000,1000000)f8,O")))
    yield "void", pickled(call(name("numpy", "dtype"), text("V2147483647")), b"(K\x03", text("<"), b"NNtb")
    yield (
        "buffer",
        pickled(call(name("numpy.core.numeric", "_frombuffer"), data(b""), dtype, numbers(2**62), text("C"))),
    )
    yield "size", pickled(tensor(numbers(2**62, 2**62), numbers(0, 0)))
    yield "expanded", pickled(tensor(numbers(2**40), numbers(0)))
    yield "negative-stride", pickled(tensor(numbers(4), numbers(-1), 3))
    yield "outside", pickled(tensor(numbers(5), numbers(1)))
    yield "dimensions", pickled(tensor(numbers(*[1] * 60), numbers(*[1] * 60)))
    yield "torch-size", pickled(call(name("torch", "Size"), numbers(2**80)))


def containers() -> Iterator[tuple[str, bytes]]:
    """Zip files and streams of torch.save that lie."""
    plain = saved({"x": torch.arange(4.0)})
    stream = saved({"x": torch.arange(4.0)}, False)
    yield "storage-size", plain.replace(b"K\x04tq", b"K\x7ftq", 1)
    yield "stream-size", stream.replace(b"K\x04Ntq", b"J\xff\xff\xff\x7fNtq", 1)
    yield "stream-cut", stream[:-9]
    content = [("archive/data.pkl", b"\x80\x02N."), ("archive/data/0", b"\x00" * 2**20)]
    yield "compressed", zipped(content, zipfile.ZIP_DEFLATED)
    yield "two-pickles", zipped([*content, ("other/data.pkl", b"\x80\x02N.")])
    twice = zipped([("archive/data.pkl", b"\x80\x02N."), ("archive/data.pkm", b"\x80\x02N.")])
    yield "same-name", twice.replace(b"data.pkm", b"data.pkl")
    end = plain.rindex(b"PK\x05\x06")
    yield "records", plain[: end + 8] + b"\xff\xff\xff\xff" + plain[end + 12 :]
    yield "directory", plain[: end + 16] + b"\xff\xff\xff\x7f" + plain[end + 20 :]
    wide = b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, 2**62, 2**62, 2**62, 2**62)
    yield "zip64", plain[:end] + wide + b"PK\x06\x07" + struct.pack("<IQI", 0, end, 1) + plain[end:]
    entry = plain.index(b"PK\x01\x02")
    yield "header-outside", plain[: entry + 42] + b"\xff\xff\xff\x7f" + plain[entry + 46 :]
    yield "record-outside", plain[: entry + 20] + b"\xff\xff\xff\x7f" * 2 + plain[entry + 28 :]


def safetensors() -> Iterator[tuple[str, bytes]]:
    """Headers that lie, and facts that no network or solver has."""
    one = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    solver = {"format": json.dumps("gas_engine.solver/1"), "family": json.dumps("gs")}
    edm = {"format": "gas_engine.edm/1", "precond": "EDMPrecond"}
    yield "header-long", with_header({"x": one}, b"\x00" * 4, 2**60)
    yield "offsets", with_header({"x": {**one, "data_offsets": [0, 2**40]}}, b"\x00" * 4)
    yield "shape", with_header({"x": {**one, "shape": [2**62, 4]}}, b"\x00" * 4)
    yield "overlap", with_header({"x": one, "y": one}, b"\x00" * 4)
    yield (
        "twice",
        with_header(b'{"x":' + json.dumps(one).encode() + b',"x":' + json.dumps(one).encode() + b"}", b"\x00" * 4),
    )
    yield "deep-header", with_header(b'{"x":' * 10**5)
    yield "deep-facts", with_header({"__metadata__": {**edm, "kwargs": "[" * 10**5}, "x": one}, b"\x00" * 4)
    yield "large-facts", with_header({"__metadata__": {**edm, "kwargs": '{"a": "' + "x" * 10**7 + '"}'}})
    for field, value in (("num_blocks", 10**9), ("model_channels", 10**9), ("channel_mult", [1] * 10**5)):
        facts = {**edm, "kwargs": json.dumps({**TINY, field: value})}
        yield f"edm-{field}", with_header({"__metadata__": facts, "x": one}, b"\x00" * 4)
    yield "edm-no-object", with_header({"__metadata__": {**edm, "kwargs": "3"}, "x": one}, b"\x00" * 4)
    yield "solver-steps", save({"x": torch.zeros(1)}, {**solver, "steps": json.dumps(10**12)})
    yield "solver-facts", save({"x": torch.zeros(1)}, {**solver, "steps": "[" * 10**5})


def modules() -> Iterator[tuple[str, bytes]]:
    """Networks that contain themselves, or more modules than there is time for."""
    kind = name("torch.nn", "Module") + b")\x81q\x00"
    empty = b"}" + text("_parameters") + b"}s" + text("_modules") + b"}"
    itself = kind + empty + b"".join(text(part) + b"h\x00s" for part in "ab") + b"sb"
    yield "itself", pickled(b"}", text("ema"), itself, b"s")
    yield "discriminator-itself", pickled(b"}", text("D"), itself, b"s")
    leaf = name("torch.nn", "Module") + b")\x81" + empty + b"sbq\x00"
    for _ in range(50):
        both = b"".join(text(part) + b"h\x00s" for part in "ab")
        leaf += name("torch.nn", "Module") + b")\x81" + empty + both + b"sbq\x00"
    yield "laughing-modules", pickled(b"}", text("D"), leaf, b"s")
    long = name("torch.nn", "Module") + b")\x81" + empty + b"sbq\x00"
    for _ in range(50):
        long += name("torch.nn", "Module") + b")\x81" + empty + text("x" * 60_000) + b"h\x00ssbq\x00"
    yield "long-names", pickled(b"}", text("D"), long, b"s")
    items = nested(60, b")", b"h\x00h\x00\x86") + name("dnnlib", "EasyDict") + b")\x81h\x00N\x86a"
    yield "laughing-items", pickled(items)
    D = R3GANDiscriminator([8], [2], [1], channels=1)
    state = dict(D.state_dict())
    state["MainLayers.999999999.Layers.0.LinearLayer1.Layer.weight"] = torch.zeros(1)
    yield "stages", pickle.dumps({"D": state})
    wide = {**D.state_dict(), "MainLayers.0.Layers.0.LinearLayer1.Layer.weight": torch.zeros(1, 1).expand(1, 10**6)}
    yield "widths", pickle.dumps({"D": wide})
    yield "edm-blocks", dumps({"ema": edm_record(build_edm(TINY), {**TINY, "num_blocks": 10**12})})
    half = torch.zeros(2**20, dtype=torch.float16)
    yield "shared", pickle.dumps({"D": {f"{i}.ExtractionLayer.Layer.weight": half for i in range(20_000)}})
    yield "set", pickle.dumps({"noise": [torch.zeros(1, 1, 1).expand(1, 2000, 2000)] * 10**4, "images": []})
    yield "student", pickle.dumps({"ema": {"shadow_params": [torch.zeros(1).expand(10**6)] * 10**4}})


def seeds(folder) -> list[tuple[str, bytes]]:
    """One valid file of every format: the kind of reader that it is for, and its bytes."""
    torch.manual_seed(0)
    network = build_edm(TINY)
    D = R3GANDiscriminator([4], [2], [1], channels=1)
    save_edm(network, TINY, folder / "edm.safetensors")
    save_solver(GeneralizedSolver(steps=3, schedule=Schedule.edm(), t_eps=1e-3), folder / "solver.safetensors")
    rows = {"ema": {"shadow_params": student(3)}, "step": 1}
    weights = {"state_dict": {f"model.{i}": torch.randn(3, i) for i in range(5)}, "callbacks": {"a": nn.Linear(1, 1)}}
    return [
        ("edm", dumps({"ema": edm_record(network, TINY, positional=3)})),
        ("r3gan", pickle.dumps({"D": nn.ModuleDict({"Model": D})})),
        ("set", pickle.dumps(teacher_set(2, int, shape=(1, 2, 2)))),
        ("set", pickle.dumps(teacher_set(2, str, latents=False, shape=(3, 8, 8)), 2)),
        ("student", saved(rows)),
        ("student", saved(rows, False)),
        ("checkpoint", saved(weights)),
        ("checkpoint", saved(weights, False)),
        ("solver", (folder / "solver.safetensors").read_bytes()),
        ("edm", (folder / "edm.safetensors").read_bytes()),
        ("index", json.dumps({"format": "gas_engine.teacher/1", "made_by": {}, "shards": []}).encode()),
    ]


MAKERS: dict[str, Callable[..., Iterator[tuple[str, bytes]]]] = {
    "executions": executions, "bombs": bombs, "containers": containers, "safetensors": safetensors, "modules": modules,
}  # fmt: skip
