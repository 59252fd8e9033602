"""Each op on its own, in ten lines, outside the engine: `python examples/ops.py` runs them all.

Nothing here needs a model, a solver or a GPU; every op also works under torch.compile, vmap and autograd.
"""

import torch
import torch.nn.functional as F
from torch import nn

from gas_engine import ops


def a_multistep_sampler() -> torch.Tensor:
    """lincomb: one pass over the history instead of one per term; the network's input comes out in bfloat16."""
    x, history = torch.randn(4, 3, 32, 32), []
    for _ in range(5):
        network_input = ops.lincomb([x], torch.ones(1), scale=torch.tensor([0.5]), cast=torch.bfloat16)[1]
        history.append(torch.tanh(network_input))  # stands for a network
        weights = torch.full((len(history),), -0.1)
        x = ops.lincomb([x, *history], torch.cat([torch.tensor([0.9]), weights]))
    return x


def gradients_of_a_sampler_step() -> torch.Tensor:
    """adjoint_step: two weighted sums of the later cotangents and all inner products, in one pass."""
    x, f, g1, g2 = torch.randn(4, 8, 3, 32, 32)
    a, b = torch.tensor([0.9, 0.0]), torch.tensor([-0.1, 0.2])
    mu, g_x, d_a, d_b = ops.adjoint_step(x, f, [g1, g2], a, b)
    assert torch.allclose(d_a[0], (g1.double() * x).sum())
    mu_, d_a_, d_b_ = ops.adjoint_step_(x, f, [g1, g2], a, b)  # the same, over x
    return x - g_x + mu - mu_ + (d_a - d_a_ + d_b - d_b_).sum()


class FrozenBlock(nn.Module):
    """group_norm_silu and conv_frozen: a residual block that keeps its input for the backward pass, and no more."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(8, channels), nn.Conv2d(channels, channels, 3, padding=1)
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        h = ops.group_norm_silu(x, 8, self.norm.weight, self.norm.bias, scale=scale, shift=shift)
        return x + ops.conv_frozen(h, self.conv.weight, self.conv.bias, padding=1)


def gradients_through_a_frozen_block() -> torch.Tensor:
    """With respect to the image and to what the time label makes of it."""
    x = torch.randn(2, 32, 16, 16, requires_grad=True)
    scale, shift = torch.zeros(2, 2, 32, requires_grad=True)
    FrozenBlock(32)(x, scale, shift).square().mean().backward()
    assert x.grad is not None
    return x.grad


def a_transformer_feed_forward() -> torch.Tensor:
    """geglu keeps the projection once; PyTorch keeps the gelu's output as well."""
    tokens = torch.randn(2, 77, 64, requires_grad=True)
    up, down = nn.Linear(64, 512).requires_grad_(False), nn.Linear(256, 64).requires_grad_(False)
    return down(ops.geglu(up(tokens)))


def a_llama_feed_forward() -> torch.Tensor:
    """silu_mul: SwiGLU of two projections, or of the halves of one; PyTorch keeps silu's output besides them."""
    tokens = torch.randn(2, 77, 64, requires_grad=True)
    gate, value = (nn.Linear(64, 256, bias=False).requires_grad_(False) for _ in range(2))
    down = nn.Linear(256, 64, bias=False).requires_grad_(False)
    y = down(ops.silu_mul(gate(tokens), value(tokens)))
    assert torch.allclose(y, down(ops.silu_mul(torch.cat([gate(tokens), value(tokens)], -1))), atol=1e-6)
    return y


def a_discriminator_with_gradient_penalty() -> torch.Tensor:
    """bias_leaky_relu keeps one bit an element, resample2d nothing; both have second derivatives."""
    weight, bias = torch.randn(8, 3, 3, 3, requires_grad=True), torch.zeros(8, requires_grad=True)
    images = torch.randn(4, 3, 16, 16, requires_grad=True)
    h = ops.bias_leaky_relu(F.conv2d(images, weight, padding=1), bias)
    score = ops.resample2d(h, [1, 3, 3, 1], down=2).mean((1, 2, 3)).sum()
    (gradient,) = torch.autograd.grad(score, images, create_graph=True)
    (gradient.square().sum() - score).backward()
    assert weight.grad is not None
    return weight.grad


def a_step_and_its_exact_inverse() -> torch.Tensor:
    """reversible_step: keep two states and one byte an element instead of the whole trajectory."""
    x_prev, x, f = torch.randn(3, 4, 3, 32, 32)
    coef = torch.tensor([0.9, 0.05, -0.1])
    x_next, codes = ops.reversible_step(x_prev, x, f, coef)
    assert torch.equal(ops.reversible_inverse(x_next, x, f, coef, codes), x_prev)
    return x_next


def guidance() -> torch.Tensor:
    """Classifier-free guidance is a linear combination of two."""
    uncond, cond = torch.randn(2, 4, 4, 64, 64)
    return ops.lincomb([uncond, cond], torch.tensor([1 - 7.5, 7.5]))


def projected_guidance() -> torch.Tensor:
    """dots: inner products with one tensor, in one pass; here guidance without its part along the picture."""
    uncond, cond = torch.randn(2, 4, 64, 64)
    direction = cond - uncond
    along, square = ops.dots(cond, [direction, cond])
    across = ops.lincomb([direction, cond], torch.stack([torch.ones_like(along), -along / square]))
    assert ops.dots(cond, [across]).abs() < 1e-5 * square
    return ops.lincomb([cond, across], torch.tensor([1.0, 6.5]))


EXAMPLES = (
    a_multistep_sampler,
    gradients_of_a_sampler_step,
    gradients_through_a_frozen_block,
    a_transformer_feed_forward,
    a_llama_feed_forward,
    a_discriminator_with_gradient_penalty,
    a_step_and_its_exact_inverse,
    guidance,
    projected_guidance,
)

if __name__ == "__main__":
    for example in EXAMPLES:
        print(f"{example.__name__:40} {list(example().shape)}   {example.__doc__}")
