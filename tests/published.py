"""Files as their publishers write them: classes that pickle with their source code, sets of samples, students."""

from __future__ import annotations

import collections
import contextlib
import pickle
import sys
import types

import torch
from torch import nn


class EasyDict(dict):
    """As dnnlib.util.EasyDict."""


def reconstruct(meta):
    raise AssertionError("it was executed")


EasyDict.__module__, EasyDict.__qualname__ = "dnnlib.util", "EasyDict"
reconstruct.__module__, reconstruct.__qualname__ = "torch_utils.persistence", "_reconstruct_persistent_obj"


@contextlib.contextmanager
def publishers():
    """The modules that the pickler looks for, which no reader needs."""
    modules = {name: types.ModuleType(name) for name in ("dnnlib", "dnnlib.util", "torch_utils")}
    modules["torch_utils.persistence"] = types.ModuleType("torch_utils.persistence")
    modules["dnnlib.util"].EasyDict = EasyDict
    modules["torch_utils.persistence"]._reconstruct_persistent_obj = reconstruct
    reconstruct.__name__ = "_reconstruct_persistent_obj"
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


class Persistent:
    """A module as torch_utils.persistence pickles it: a call with class name, source code and state."""

    def __init__(self, class_name, module, args, kwargs, meta=dict, **attributes):
        self.meta = {"type": "class", "version": 6, "module_src": "raise SystemExit('executed')"}
        self.meta["class_name"], self.kind = class_name, meta
        state = {key: value for key, value in module.__dict__.items() if not callable(value)}
        self.state = {**state, **attributes, "_init_args": args, "_init_kwargs": EasyDict(kwargs)}

    def __reduce__(self):
        return reconstruct, (self.kind({**self.meta, "state": self.state}),), None


def edm_record(network, kwargs, precond="EDMPrecond", positional=0, meta=dict, **attributes):
    """An EDM network as the published class `precond` pickles itself, its first arguments positional."""
    unet = Persistent(kwargs.get("model_type", "SongUNet"), network.model, (), {}, meta)
    args = tuple(kwargs[name] for name in ("img_resolution", "img_channels", "label_dim")[:positional])
    rest = dict(list_after(kwargs, positional))
    shell = nn.Module()
    shell._modules["model"] = unet
    return Persistent(precond, shell, args, rest, meta, use_fp16=False, **attributes)


def list_after(kwargs, positional):
    skip = ("img_resolution", "img_channels", "label_dim")[:positional]
    return [(key, value) for key, value in kwargs.items() if key not in skip] + [("use_fp16", True)]


def dumps(value, protocol=4):
    with publishers():
        return pickle.dumps(value, protocol)


def teacher_set(rows=3, classes=None, latents=True, shape=(3, 8, 8)):
    """`dataset.pkl`: a defaultdict of lists."""
    table = collections.defaultdict(list)
    for i in range(rows):
        table["noise"].append(torch.randn(shape))
        table["images"].append(torch.randn(3, 8, 8))
        table["latents"].append(torch.randn(shape) if latents else None)
        table["condition"].append(classes(i) if classes else None)
    return table


def student(steps=4):
    """The tensors of a published student's average, in order."""
    return [torch.randn(steps - 1), *(torch.randn(steps) / 100 for _ in range(1 + 2 * steps))]
