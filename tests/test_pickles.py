"""Third-party pickles: data comes out, nothing is imported or executed."""

from __future__ import annotations

import collections
import io
import os
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

from gas_engine._safe_pickle import Record, attributes_of, read_pickle, state_dict_of
from gas_engine.adapters.r3gan import load_r3gan
from gas_engine.networks import R3GANDiscriminator


def read(value, protocol=pickle.DEFAULT_PROTOCOL):
    return read_pickle(io.BytesIO(pickle.dumps(value, protocol)))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 2)
        self.rest = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2))
        self.register_buffer("scale", torch.tensor([2.0]))
        self.register_buffer("scratch", torch.zeros(1), persistent=False)
        self.nothing = None


class Persistent(nn.Linear):
    """As torch_utils.persistence pickles a class: a call of a function with source code and state."""

    def __reduce__(self):
        module = types.ModuleType("torch_utils.persistence")
        sys.modules.setdefault("torch_utils", types.ModuleType("torch_utils"))
        sys.modules["torch_utils.persistence"] = module
        module._reconstruct_persistent_obj = rebuild
        meta = {"type": "class", "version": 6, "module_src": "raise SystemExit", "class_name": "Linear"}
        return rebuild, ({**meta, "state": dict(self.__dict__)},), None


def rebuild(meta):
    raise AssertionError("it was executed")


rebuild.__module__, rebuild.__qualname__ = "torch_utils.persistence", "_reconstruct_persistent_obj"


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_comes_out_as_it_is(protocol):
    rows = collections.defaultdict(list, {"noise": [1, 2.5, 3j], "cond": [None, "a cat", b"\x00\xff"]})
    value = {"rows": rows, "order": collections.OrderedDict(a=1, b=(2, {3})), "type": torch.bfloat16}
    value["size"], value["device"] = torch.Size([2, 3]), torch.device("cpu")
    out = read(value, protocol)
    assert out == value and type(out["rows"]) is collections.defaultdict and type(out["order"]) is type(value["order"])


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_and_tensors_come_out_bitwise(protocol):
    base = torch.randn(4, 5)
    tensors = [base, base.T, base[1:, ::2], base.bfloat16(), torch.arange(3), nn.Parameter(base), torch.tensor(True)]
    for wanted, got in zip(tensors, read(tensors, protocol), strict=True):
        assert type(got) is torch.Tensor and got.dtype == wanted.dtype and got.stride() == wanted.stride()
        assert torch.equal(got, wanted.detach()) and not got.requires_grad
    one, two = read([base, base[0]], protocol)
    assert one.untyped_storage().data_ptr() != 0 and torch.equal(one[0], two)
    arrays = [np.arange(6.0).reshape(2, 3), np.float32(1.5), np.asfortranarray(np.ones((2, 3), "i4")), np.array(["a"])]
    for wanted, got in zip(arrays, read(arrays, protocol), strict=True):
        assert got.dtype == wanted.dtype and np.array_equal(got, wanted)


@pytest.mark.parametrize("protocol", [2, 5])
def test_a_module_becomes_a_record_with_its_weights(protocol):
    network = Network()
    record = read({"D": network}, protocol)["D"]
    assert isinstance(record, Record) and (record.module, record.name) == (__name__, "Network")
    state, wanted = state_dict_of(record), network.state_dict()
    assert state.keys() == wanted.keys() and all(torch.equal(state[k], wanted[k]) for k in wanted)


def test_a_persistent_class_is_not_executed_and_keeps_its_weights():
    network = nn.Sequential(Persistent(3, 2))
    record = read(network)
    inner = attributes_of(record)["_modules"]["0"]
    assert inner.name == "_reconstruct_persistent_obj" and inner.args[0]["module_src"] == "raise SystemExit"
    assert torch.equal(state_dict_of(record)["0.weight"], network[0].weight)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_malicious_pickle_does_nothing(protocol, tmp_path):
    target = tmp_path / "touched"
    record = read([Malicious(target)], protocol)[0]
    assert not target.exists() and record.args == (f"touch {target}",) and record.name == "system"


@pytest.mark.parametrize("call", ["eval", "getattr", "exec", "__import__"])
def test_builtins_that_act_are_inert(call):
    record = read_pickle(io.BytesIO(b"c__builtin__\n" + call.encode() + b"\n(S'1 + 1'\ntR."))
    assert isinstance(record, Record) and record.args == ("1 + 1",)


def test_nothing_is_imported(tmp_path, monkeypatch):
    (tmp_path / "trap.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    record = read_pickle(io.BytesIO(b"\x80\x02ctrap\nKind\n)\x81}\x8c\x01xK\x01sb."))
    assert attributes_of(record) == {"x": 1} and "trap" not in sys.modules


def test_unknown_containers_keep_what_is_put_into_them():
    class Names(list):
        pass

    class Table(dict):
        pass

    for kind, items in ((Names, [1, 2]), (Table, [("a", 1)])):
        kind.__module__, kind.__qualname__ = "some.where", kind.__name__
        sys.modules["some"], sys.modules["some.where"] = types.ModuleType("some"), types.ModuleType("some.where")
        setattr(sys.modules["some.where"], kind.__name__, kind)
        assert read(kind(dict(items) if kind is Table else items)).items == items


def test_broken_files_are_named(tmp_path):
    path, data = tmp_path / "broken.pkl", pickle.dumps({"x": torch.randn(100)})
    for keep in (0, 1, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:keep])
        with pytest.raises(ValueError, match=r"broken\.pkl"):
            read_pickle(path)
    path.write_bytes(b"\x93NUMPY no pickle")
    with pytest.raises(ValueError, match=r"broken\.pkl"):
        read_pickle(path)
    (tmp_path / "zip").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(ValueError, match="zip"):
        read_pickle(tmp_path / "zip")
    with pytest.raises(ValueError, match="absent"):
        read_pickle(tmp_path / "absent.pkl")


def test_a_tensor_that_reaches_outside_of_its_storage_is_refused():
    storage = pickle.dumps(torch.zeros(4), 2)
    grown = storage.replace(b"K\x00K\x04\x85", b"K\x00K\x40\x85")  # size [64] of 4 numbers
    assert grown != storage
    with pytest.raises(ValueError, match="storage"):
        read_pickle(io.BytesIO(grown))


def test_what_is_no_module_says_so():
    with pytest.raises(ValueError, match="no torch module"):
        state_dict_of(read(types.SimpleNamespace(a=1)))
    with pytest.raises(ValueError, match="no recorded object"):
        state_dict_of([1])


@pytest.mark.parametrize("classes", [None, 5])
def test_a_published_discriminator_comes_out_of_its_snapshot(classes, tmp_path):
    """Its class embedding counts as ones: the features are summed."""
    D = R3GANDiscriminator([8, 16], [2, 4], [1, 2], channels=2, classes=classes, embedding=3)
    for p in D.parameters():
        nn.init.normal_(p, std=0.3)
    (tmp_path / "snapshot.pkl").write_bytes(pickle.dumps({"G": None, "D": nn.ModuleDict({"Model": D})}))
    loaded, x = load_r3gan(tmp_path / "snapshot.pkl"), torch.randn(3, 2, 8, 8)
    features = x
    for layer in D.chain():
        features = layer(features)
    assert torch.equal(loaded(x), features.sum(1)) and loaded.classes is None
    if classes:
        D.load_published(loaded.state_dict())
        assert torch.equal(D(x, torch.tensor([0, 4, 2])), D(x, torch.tensor([1, 1, 1])))
    (tmp_path / "other.pkl").write_bytes(pickle.dumps({"G": D}))
    with pytest.raises(ValueError, match=r"other\.pkl holds no discriminator under 'D': it has the keys G"):
        load_r3gan(tmp_path / "other.pkl")
    (tmp_path / "linear.pkl").write_bytes(pickle.dumps(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"linear\.pkl.*no weights of an R3GAN"):
        load_r3gan(tmp_path / "linear.pkl")


@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_torch_save_come_out_bitwise(zipped, tmp_path):
    """Also shared storages, views of them, and objects that `weights_only` refuses."""
    base = torch.randn(4, 5)
    value = {
        "state_dict": {"a": base, "b": base[1:, ::2], "c": torch.arange(3).bfloat16(), "d": torch.empty(0)},
        "callbacks": {"best": types.SimpleNamespace(score=np.float64(0.5)), Network: 1}, "lr": torch.tensor(1e-3),
        "complex": torch.randn(2, dtype=torch.complex64), "bool": torch.tensor([True, False]), "wide": base.double(),
        "module": Network(), "old": nn.Parameter(base),
    }  # fmt: skip
    path = tmp_path / "model.ckpt"
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    got, wanted = read_pickle(path), torch.load(path, weights_only=False)
    assert attributes_of(got["callbacks"]["best"]) == {"score": 0.5} and got.keys() == value.keys()
    for name in ("complex", "bool", "wide", "lr", "old"):
        assert got[name].dtype == wanted[name].dtype and torch.equal(got[name], wanted[name].detach())
    for name, tensor in wanted["state_dict"].items():
        assert torch.equal(got["state_dict"][name], tensor) and got["state_dict"][name].stride() == tensor.stride()
    if zipped:
        torch.save({"small": torch.tensor([1, 2], dtype=torch.uint16)}, tmp_path / "small.pt")
        assert read_pickle(tmp_path / "small.pt")["small"].tolist() == [1, 2]
    state = got["state_dict"]
    assert state["a"].untyped_storage().data_ptr() == state["b"].untyped_storage().data_ptr()
    wanted = value["module"].state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in state_dict_of(got["module"]).items())
    state["a"].zero_()  # a private map
    assert torch.equal(torch.load(path, weights_only=False)["state_dict"]["a"], base)


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read as on Linux: run it there")
def test_zip_files_are_mapped(tmp_path):
    """Reading a file of torch.save takes no memory for its numbers."""
    path = tmp_path / "large.pt"
    torch.save({"x": torch.zeros(2**24)}, path)
    before = resident()
    x = read_pickle(path)["x"]
    assert resident() - before < 2**22 and x.shape == (2**24,)


def test_long_bytes_are_a_view_of_the_file(tmp_path):
    path, text = tmp_path / "long.pkl", bytes(range(256)) * 1024
    path.write_bytes(pickle.dumps([text, text[:100], np.frombuffer(text, "u1"), torch.arange(2.0**16)]))
    view, short, array, tensor = read_pickle(path)
    assert view == text and view.readonly and short == text[:100] and array.tobytes() == text
    assert torch.equal(tensor, torch.arange(2.0**16))


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
