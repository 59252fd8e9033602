"""`lean`: a view of a frozen network that keeps, for the gradient of its input, only what that gradient needs.

| module | keeps in PyTorch | keeps here |
|---|---|---|
| convolution | its input | nothing |
| group norm, then (scale, shift and) SiLU or GELU | input, normalised, scaled | the input |
| group norm of a skip connection joined to the decoder's state | both, joined | both, as they are anyway |
| layer norm, then scale and shift that want a gradient | input, normalised | the input |
| RMS norm | input, also in float32, normalised | the input |
| GEGLU, SwiGLU feed-forward | projection, activation's output | the projection |
| batch norm in eval mode | its input | a number per channel |
| linear layer of quantised weights | the dequantised weights | nothing |
| ReLU | its output | a bit per element |
| average pooling by 2 | its input | nothing |
| explicit softmax attention of diffusers | the attention matrix, several times | queries, keys, values, result |

The weights are shared, not copied, and the network itself is left as it was.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import bias_leaky_relu, conv_frozen, geglu, resample2d, silu_mul
from ._joined import Joined, joining
from ._norms import DeferredGroupNorm, DeferredLayerNorm
from ._quantised import is_quantised, quantised
from ._rebuilt import rebuilt
from ._view import Forward, Make, StandIn, hooked, settle, view

__all__ = ["Coverage", "lean"]


class Coverage(dict[str, tuple[int, int]]):
    """For each class that `lean` knows, and each other class of leaf module: how many became lean, and how many not."""

    @property
    def told(self) -> str:
        """In one line."""
        done = ", ".join(f"{name} {count}" for name, (count, _) in sorted(self.items()) if count)
        left = ", ".join(f"{name} {count}" for name, (_, count) in sorted(self.items()) if count)
        return f"{done or 'nothing'}{'; as they are: ' if left else ''}{left}"

    def __str__(self) -> str:
        rows = [f"{'module':24} lean  left" if self else "no module"]
        rows += [f"{name:24} {done:4}  {left:4}" for name, (done, left) in sorted(self.items())]
        return "\n".join(rows)


def lean(network: nn.Module) -> nn.Module:
    """A network of the same weights whose graph keeps less; `.coverage` says what was converted.

    Same outputs: to float32 rounding (1e-6 of the output, 1e-5 of a gradient) where a group norm, a gated unit, batch
    norm or explicit attention runs as one op, to the bit elsewhere; gradients for the input, the time label and the
    conditioning. A module that is not known, or has hooks, stays as it is. The result follows later changes of the
    weights' values, since it shares them, and its `.to()` moves or casts them for both; its `.train()` does not reach
    the original.
    Raises RuntimeError for trainable weights: they would need what is dropped here.

        small = lean(network.requires_grad_(False).eval())
        print(small.coverage)
    """
    done: Counter[str] = Counter()
    left: Counter[str] = Counter()

    def convert(module: nn.Module) -> Make | None:
        name = type(module).__name__
        rule = next((rule for kind, rule in _RULES if kind(module)), None)
        if rule is not None and not hooked(module) and rule(copy.copy(module)) is not None:
            done[name] += 1
            return rule if rule is _group_norm else lambda m: _settled(rule(m))
        if rule is not None or not any(True for _ in module.children()):
            left[name] += 1
        return joining(module)

    result = view(network, convert, "lean")
    result.coverage = Coverage({k: (done[k], left[k]) for k in {*done, *left}})  # type: ignore[assignment]
    return result


def _settled(forward: Forward | None) -> Forward | None:
    if forward is None:
        return None

    def call(*args: Any, **kwargs: Any) -> Any:
        if kwargs or any(isinstance(a, StandIn) for a in args):
            return forward(*settle(args), **settle(kwargs))
        return forward(*args)

    return call


def _conv(m: Any) -> Forward | None:
    if m.padding_mode != "zeros" or isinstance(m.padding, str):
        return None
    transposed = isinstance(m, nn.modules.conv._ConvTransposeNd)
    if not transposed:
        return lambda input: conv_frozen(input, m.weight, m.bias, m.stride, m.padding, m.dilation, m.groups)
    return lambda input: conv_frozen(
        input, m.weight, m.bias, m.stride, m.padding, m.dilation, m.groups, True, m.output_padding
    )


def _group_norm(m: Any) -> Forward:
    return lambda input: DeferredGroupNorm(input if isinstance(input, Joined) else settle(input), m)


def _layer_norm(m: Any) -> Forward | None:
    return None if m.weight is not None else lambda x: DeferredLayerNorm(x, m)  # with weights, it is not modulated


def _rms_norm(m: Any) -> Forward:
    own = type(m).forward

    def forward(x: Tensor) -> Tensor:
        # What it keeps beyond its input is float32 copies of half precision; the fused kernel of CUDA keeps none.
        if x.dtype not in (torch.bfloat16, torch.float16) or (x.is_cuda and type(m) is nn.RMSNorm):
            return own(m, x)
        return rebuilt(lambda t: own(m, t), x)

    return forward


def _batch_norm(m: Any) -> Forward | None:
    if m.running_mean is None:
        return None

    def forward(x: Tensor) -> Tensor:
        if m.training:
            return type(m).forward(m, x)
        scale = torch.rsqrt(m.running_var + m.eps)
        if m.weight is not None:
            scale = scale * m.weight
        shift = -m.running_mean * scale if m.bias is None else m.bias - m.running_mean * scale
        shape = (1, -1) + (1,) * (x.dim() - 2)
        return x * scale.to(x.dtype).view(shape) + shift.to(x.dtype).view(shape)

    return forward


def _avg_pool(m: Any) -> Forward | None:
    def pair(v: Any) -> tuple[int, ...]:
        return (v, v) if isinstance(v, int) else tuple(v)

    plain = pair(m.kernel_size) == pair(m.stride) == (2, 2) and pair(m.padding) == (0, 0)
    if not plain or m.ceil_mode or m.divisor_override:
        return None
    return lambda input: resample2d(input, (1.0, 1.0), down=2)


def _geglu(m: Any) -> Forward | None:
    if not isinstance(getattr(m, "proj", None), nn.Linear):
        return None
    return lambda hidden_states, *args, **kwargs: geglu(m.proj(hidden_states))


def _swiglu(m: Any) -> Forward | None:
    if type(m.activation) is not nn.SiLU:
        return None

    def forward(hidden_states: Tensor) -> Tensor:
        value, gate = m.proj(hidden_states).chunk(2, dim=-1)
        return silu_mul(gate, value)

    return forward


def _attention(m: Any) -> Forward | None:
    """diffusers' explicit softmax attention becomes scaled_dot_product_attention where both are one formula."""
    from diffusers.models import attention_processor as processors  # it is there: the module comes from it

    if type(m.processor) is not processors.AttnProcessor or m.upcast_attention or m.upcast_softmax:
        return None
    if not m.scale_qk or m.norm_q is not None or m.norm_k is not None:
        return None  # the other processor scales all the same, and norms what this one leaves
    m.processor = processors.AttnProcessor2_0()
    own: Forward = type(m).forward.__get__(m)
    return own


def _of_diffusers(m: nn.Module, name: str) -> bool:
    return type(m).__name__ == name and type(m).__module__.startswith("diffusers.")


_PLAIN_CONVS = {
    kind.forward
    for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
}
_RULES: list[tuple[Callable[[nn.Module], bool], Callable[[Any], Forward | None]]] = [
    (lambda m: isinstance(m, nn.modules.conv._ConvNd) and type(m).forward in _PLAIN_CONVS, _conv),
    (lambda m: type(m) is nn.GroupNorm, _group_norm),
    (lambda m: type(m) is nn.LayerNorm, _layer_norm),
    (lambda m: type(m) is nn.RMSNorm or _of_diffusers(m, "RMSNorm"), _rms_norm),
    (is_quantised, quantised),
    (lambda m: isinstance(m, nn.modules.batchnorm._BatchNorm), _batch_norm),
    (lambda m: type(m) is nn.AvgPool2d, _avg_pool),
    (lambda m: type(m) is nn.ReLU, lambda m: lambda input: bias_leaky_relu(input, slope=0.0)),
    (lambda m: _of_diffusers(m, "GEGLU"), _geglu),
    (lambda m: _of_diffusers(m, "SwiGLU"), _swiglu),
    (lambda m: _of_diffusers(m, "Attention"), _attention),
]
