"""Weights in four bits: the NormalFloat of QLoRA (arXiv 2305.14314), 36 bytes for 64 numbers.

torchao's class of that name takes only sizes that its blocks divide, and dequantises with five times its result in
memory; this one is for any weight, and needs 4 MiB beside its result.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from ._quantised import linear

BLOCK = 64  # numbers that share a scale
CHUNK = 2**20  # bytes of codes that are looked up at a time
# The quantiles of a normal distribution, scaled to [-1, 1], with an exact zero (appendix E).
VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class NF4(Tensor):
    """A weight of any shape and floating dtype as codes, uint8 [32 n] with the first of two numbers in the high bits,
    and scales, float32 [n], of its n blocks of 64 numbers in memory order; the last is filled up with zeros.

    A linear layer multiplies with it and keeps it for its gradient; any other operation dequantises it first.

        weight = NF4.of(torch.randn(320, 320))
        error = (weight.dequantize() - original).norm() / original.norm()  # about 0.09
    """

    codes: Tensor
    scales: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scales: Tensor, shape: torch.Size, dtype: torch.dtype) -> NF4:
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=codes.device)  # type: ignore[attr-defined]
        self.codes, self.scales = codes, scales
        return self

    def __init__(self, *args: Any) -> None:
        pass

    @classmethod
    @torch.no_grad()
    def of(cls, weight: Tensor) -> NF4:
        """Each number by the nearest of 16 values times the largest magnitude of its block."""
        flat = weight.detach().flatten()
        blocks = F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
        scales = blocks.abs().amax(1).float()
        values = torch.tensor(VALUES, device=weight.device)
        halves = (values[1:] + values[:-1]) / 2
        codes = torch.empty(len(blocks) * BLOCK // 2, dtype=torch.uint8, device=weight.device)
        rows = CHUNK // BLOCK
        for start in range(0, len(blocks), rows):
            here = slice(start, start + rows)
            unit = blocks[here].float() / torch.where(scales[here] > 0, scales[here], 1.0)[:, None]
            pairs = torch.bucketize(unit, halves, out_int32=True).view(-1, 2)
            codes[start * BLOCK // 2 : (start + rows) * BLOCK // 2] = pairs[:, 0] * 16 + pairs[:, 1]
        return cls(codes, scales, weight.shape, weight.dtype)

    def dequantize(self) -> Tensor:
        """The weight, in its dtype."""
        values = torch.tensor(VALUES, dtype=self.dtype).to(self.device, non_blocking=True)
        pairs = torch.stack([values.repeat_interleave(16), values.repeat(16)], 1)  # of every byte
        out = torch.empty(len(self.codes), 2, dtype=self.dtype, device=self.device)
        for start in range(0, len(out), CHUNK):
            here = slice(start, start + CHUNK)
            torch.index_select(pairs, 0, self.codes[here].int(), out=out[here])
        out.view(-1, BLOCK).mul_(self.scales[:, None])
        return out.flatten()[: self.numel()].view(self.shape)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"NF4({list(self.shape)}, {self.dtype}, {self.device})"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["codes", "scales"], (self.shape, self.dtype)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], rest: Any, size: Any, stride: Any) -> NF4:
        return NF4(inner["codes"], inner["scales"], *rest)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and torch.is_grad_enabled():
            return linear(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():  # results are plain tensors
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default, torch.ops.aten._to_copy.default):
            weight = args[0]
            device, dtype = kwargs.get("device") or weight.device, kwargs.get("dtype") or weight.dtype
            copy = func is not torch.ops.aten.detach.default
            inner = [part.to(device, copy=copy) if copy else part for part in (weight.codes, weight.scales)]
            return NF4(*inner, weight.shape, dtype)
        plain = tree_map(lambda a: a.dequantize() if isinstance(a, NF4) else a, (args, kwargs))
        return func(*plain[0], **plain[1])
