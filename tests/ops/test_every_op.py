"""What every op promises, over its one list of samples: values, derivatives, registration, compilation, bits."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import DEVICES
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from gas_engine import ops
from gas_engine.ops import _native, _samples
from gas_engine.ops._samples import group_norm_silu_samples
from gas_engine.ops.bias_leaky_relu import bias_leaky_relu_samples
from gas_engine.ops.conv_frozen import conv_frozen_samples
from gas_engine.ops.glu import geglu_samples, silu_mul_samples
from gas_engine.ops.resample2d import resample2d_samples
from gas_engine.ops.reversible import reversible_step_samples

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 4e-6, torch.float64: 1e-13, torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}


@dataclass(frozen=True)
class Op:
    """An op, its twin, its samples, and how often it differentiates."""

    op: Callable[..., Any]
    twin: Callable[..., Any]
    samples: Callable[..., Iterator[_samples.Sample]]
    derivatives: int = 2
    maps: bool = True  # under vmap
    own_kernel: bool = True  # False where PyTorch's kernels do the work: their bits may depend on the threads


OPS = {
    "lincomb": Op(ops.lincomb, ops.lincomb_reference, _samples.lincomb_samples),
    "adjoint_step": Op(ops.adjoint_step, ops.adjoint_step_reference, _samples.adjoint_step_samples),
    "conv_frozen": Op(ops.conv_frozen, ops.conv_frozen_reference, conv_frozen_samples, own_kernel=False),
    "geglu": Op(ops.geglu, ops.geglu_reference, geglu_samples, derivatives=1),
    "silu_mul": Op(ops.silu_mul, ops.silu_mul_reference, silu_mul_samples, derivatives=1),
    "group_norm_silu": Op(ops.group_norm_silu, ops.group_norm_silu_reference, group_norm_silu_samples, derivatives=1),
    "bias_leaky_relu": Op(ops.bias_leaky_relu, ops.bias_leaky_relu_reference, bias_leaky_relu_samples),
    "resample2d": Op(ops.resample2d, ops.resample2d_reference, resample2d_samples),
    "reversible_step": Op(ops.reversible_step, ops.reversible_step_reference, reversible_step_samples, maps=False),
}


def wide(value: Any) -> Any:
    """In float64, detached, wanting the same gradients."""

    def one(v: Any) -> Any:
        if not isinstance(v, Tensor):
            return torch.float64 if isinstance(v, torch.dtype) else v
        return v.detach().double().requires_grad_(v.requires_grad) if v.is_floating_point() else v

    return tree_map(one, value)


def leaves(*values: Any) -> list[Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, Tensor) and t.requires_grad]


def tensors(value: Any) -> list[Tensor]:
    return [t for t in tree_leaves(value) if isinstance(t, Tensor) and t.is_floating_point()]


def cotangents(outputs: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [_samples.draw(generator, tuple(t.shape), t.dtype, t.device) for t in outputs]


def gradients(function: Callable[..., Any], sample: _samples.Sample) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    outputs = [t for t in tensors(function(*sample.args, **sample.kwargs)) if t.requires_grad]
    return outputs, torch.autograd.grad(
        outputs, leaves(sample), [g.to(t.dtype) for g, t in zip(cotangents(outputs), outputs, strict=True)]
    )


def assert_near(got: Tensor, want: Tensor, dtype: torch.dtype, what: str) -> None:
    """Relative L2 error: single cancelled elements do not decide."""
    assert got.shape == want.shape, what
    if not got.numel():
        return
    # Inputs are of size one: a result that cancels to nothing is judged by that.
    error, norm = got.double() - want, want.norm().clamp(min=0.1 * want.numel() ** 0.5)
    assert torch.isfinite(error).all(), what
    assert error.norm() <= TOLERANCE[dtype] * norm, f"{what}: relative error {error.norm() / norm:.1e}"


def narrowest(sample: _samples.Sample) -> torch.dtype:
    return max((t.dtype for t in tensors(sample)), key=TOLERANCE.__getitem__)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_values_and_gradients_against_the_float64_twin(name: str, dtype: torch.dtype, device: str) -> None:
    op = OPS[name]
    for i, sample in enumerate(op.samples(dtype, device, requires_grad=True)):
        outputs, grads = gradients(op.op, sample)
        wanted, wanted_grads = gradients(op.twin, wide(sample))
        loosest = max([narrowest(sample), *(t.dtype for t in outputs)], key=TOLERANCE.__getitem__)
        for k, (got, want) in enumerate(zip((*outputs, *grads), (*wanted, *wanted_grads), strict=True)):
            assert_near(got.detach(), want.detach(), loosest, f"{name} sample {i} result {k}")
        for grad, leaf in zip(grads, leaves(sample), strict=True):
            assert grad.dtype == leaf.dtype and grad.shape == leaf.shape


@pytest.mark.parametrize("name", OPS)
def test_derivatives_by_finite_differences(name: str) -> None:
    op = OPS[name]
    for sample in op.samples(torch.float64, "cpu", requires_grad=True):
        flat, spec = tree_flatten((sample.args, sample.kwargs))
        if not 0 < sum(t.numel() for t in leaves(sample)) <= 600 or any(
            isinstance(v, torch.dtype) or (isinstance(v, Tensor) and v.dtype == torch.bfloat16) for v in flat
        ):
            continue
        wanted = [i for i, v in enumerate(flat) if isinstance(v, Tensor) and v.requires_grad]

        def function(*values: Tensor, flat: Any = flat, spec: Any = spec, wanted: Any = wanted) -> Any:
            filled = dict(zip(wanted, values, strict=True))
            args, kwargs = tree_unflatten([filled.get(i, v) for i, v in enumerate(flat)], spec)
            return tuple(t for t in tensors(op.op(*args, **kwargs)) if t.requires_grad)

        inputs = [flat[i] for i in wanted]
        assert gradcheck(function, inputs, fast_mode=True)
        if op.derivatives > 1:
            assert gradgradcheck(function, inputs, fast_mode=True)


class Recorder(TorchDispatchMode):
    """Every call of a registered op, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "gas_engine":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OPS)
@pytest.mark.skipif(_native.native is None, reason="the native core is off: the twins are no registered ops")
def test_opcheck(name: str, device: str) -> None:
    op, seen = OPS[name], set()
    for sample in itertools.islice(op.samples(torch.float32, device, requires_grad=True), 2, None):
        with Recorder() as recorder:
            gradients(op.op, sample)
        for func, args, kwargs in recorder.calls:
            key = (str(func), str([(getattr(a, "shape", a)) for a in tree_leaves(args)]))
            if key in seen:
                continue
            seen.add(key)
            keep = "backward" not in str(func) or op.derivatives > 1
            args = tree_map(
                lambda t, keep=keep: (
                    t.detach().clone().requires_grad_(keep and t.requires_grad) if isinstance(t, Tensor) else t
                ),
                args,
            )
            # Layouts, and with them the order of float32 sums, may differ under the compiler.
            torch.library.opcheck(func, args, kwargs, rtol=1e-5, atol=1e-5)
    assert seen


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OPS)
@pytest.mark.skipif(_native.native is None, reason="the native core is off: the twins promise no fixed order")
def test_bits_do_not_depend_on_run_or_threads(name: str, device: str) -> None:
    op = OPS[name]
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 3) if op.own_kernel else (2, 2):
            torch.set_num_threads(count)
            samples = op.samples(torch.float32, device, requires_grad=True)
            results.append([t for sample in samples for part in gradients(op.op, sample) for t in part])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(got, want) for got, want in zip(other, results[0], strict=True))


CXX = os.environ.get("CXX", "g++")
INDUCTOR = pytest.param(
    "inductor",
    1,
    marks=[
        pytest.mark.slow,
        pytest.mark.skipif(
            shutil.which(CXX) is None, reason=f"Inductor needs a C++ compiler: install {CXX}, or name another in CXX"
        ),
    ],
)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize(("backend", "count"), [("aot_eager", 4), INDUCTOR])
def test_compile_fullgraph(backend: str, count: int, name: str) -> None:
    """With a neighbour that the compiler makes code of."""
    op = OPS[name]

    def doubled(*args: Any, **kwargs: Any) -> list[Tensor]:
        return [2 * t for t in tensors(op.op(*args, **kwargs))]

    torch.compiler.reset()  # one function for all ops: what they compiled would add up
    compiled = torch.compile(doubled, backend=backend, fullgraph=True)
    for sample in itertools.islice(op.samples(torch.float32, "cpu", requires_grad=True), 3, 3 + count):
        for got, want in zip(
            itertools.chain(*gradients(compiled, sample)), itertools.chain(*gradients(doubled, sample)), strict=True
        ):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", OPS)
def test_autocast_neither_breaks_nor_narrows_sums(name: str) -> None:
    op = OPS[name]
    for sample in op.samples(torch.float32):
        plain = tensors(op.op(*sample.args, **sample.kwargs))
        with torch.autocast("cpu", torch.bfloat16):
            cast = tensors(op.op(*sample.args, **sample.kwargs))
        for got, want in zip(cast, plain, strict=True):
            assert_near(got, want.double(), torch.float32 if op.own_kernel else got.dtype, name)
            if op.own_kernel:  # the others follow PyTorch's rules of autocast
                assert got.dtype == want.dtype


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: run bench/gpu.sh on one")
@pytest.mark.parametrize("name", [name for name in OPS if name != "reversible_step"])  # it counts its escapes
def test_cuda_graph(name: str) -> None:
    """A captured call reads its inputs anew: no synchronisation, no memory that the graph does not own."""
    op = OPS[name]
    sample = with_dimensions(op, torch.float32, "cuda")
    function, inputs = as_function(op.op, sample)
    function(*inputs)  # warm-up outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function(*inputs)
    for t in inputs:
        t.mul_(0.5)
    graph.replay()
    for got, want in zip(results, function(*inputs), strict=True):
        assert torch.equal(got, want)


def with_dimensions(op: Op, dtype: torch.dtype, device: str = "cpu") -> _samples.Sample:
    """The first sample that has dimensions to map over."""
    return next(s for s in op.samples(dtype, device, requires_grad=True) if max(t.dim() for t in leaves(s)) >= 3)


def as_function(op: Callable[..., Any], sample: _samples.Sample) -> tuple[Callable[..., Any], list[Tensor]]:
    """The call as a function of the tensors that want a gradient."""
    flat, spec = tree_flatten((sample.args, sample.kwargs))
    wanted = [i for i, v in enumerate(flat) if isinstance(v, Tensor) and v.requires_grad]

    def function(*values: Tensor) -> Any:
        filled = dict(zip(wanted, values, strict=True))
        args, kwargs = tree_unflatten([filled.get(i, v) for i, v in enumerate(flat)], spec)
        return tuple(tensors(op(*args, **kwargs)))

    return function, [flat[i].detach() for i in wanted]


@pytest.mark.parametrize("name", OPS)
def test_vmap_is_a_loop(name: str) -> None:
    op = OPS[name]
    function, inputs = as_function(op.op, with_dimensions(op, torch.float32))
    if not op.maps:
        with pytest.raises(NotImplementedError, match="dynamic shape"):
            torch.func.vmap(function)(*[torch.stack([t, t]) for t in inputs])
        return
    mapped = [torch.stack([t * (1 + 0.5 * i) for i in range(3)]) for t in inputs]
    for chosen in ([True] * len(inputs), [i == 0 for i in range(len(inputs))]):
        given = [m if yes else t for m, t, yes in zip(mapped, inputs, chosen, strict=True)]
        results = torch.func.vmap(function, tuple(0 if yes else None for yes in chosen))(*given)
        for i in range(3):
            one = function(*[t[i] if yes else t for t, yes in zip(given, chosen, strict=True)])
            for got, want in zip(results, one, strict=True):
                torch.testing.assert_close(got[i], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", OPS)
def test_batches_of_cotangents(name: str) -> None:
    """`grad` with is_grads_batched, as jacobians use it."""
    op = OPS[name]
    sample = with_dimensions(op, torch.float32)
    outputs = [t for t in tensors(op.op(*sample.args, **sample.kwargs)) if t.requires_grad]
    batches = [torch.stack([g, 2 * g, -g]) for g in cotangents(outputs)]
    got = torch.autograd.grad(outputs, leaves(sample), batches, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        want = torch.autograd.grad(outputs, leaves(sample), [g[i] for g in batches], retain_graph=True)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a[i], b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in OPS if name != "reversible_step"])  # it returns a named tuple
def test_jit_trace_records_the_op(name: str) -> None:
    op = OPS[name]
    function, inputs = as_function(op.op, with_dimensions(op, torch.float32))
    traced = torch.jit.trace(function, tuple(inputs))
    for got, want in zip(traced(*[2 * t for t in inputs]), function(*[2 * t for t in inputs]), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", OPS)
def test_function_transforms_and_forward_mode(name: str) -> None:
    """grad and jvp of torch.func, and a Jacobian-vector product that agrees with the tape's."""
    op = OPS[name]
    function, inputs = as_function(op.op, with_dimensions(op, torch.float64))

    def loss(*values: Tensor) -> Tensor:
        return sum((t.double() ** 3).sum() for t in function(*values))

    grads = torch.func.grad(loss, tuple(range(len(inputs))))(*inputs)
    leaves_ = [t.clone().requires_grad_() for t in inputs]
    for got, want in zip(grads, torch.autograd.grad(loss(*leaves_), leaves_), strict=True):
        torch.testing.assert_close(got, want)
    directions = cotangents(inputs)
    _, slope = torch.func.jvp(loss, tuple(inputs), tuple(directions))
    expected = sum((g * d).sum() for g, d in zip(grads, directions, strict=True))
    torch.testing.assert_close(slope, expected)


def fingerprint() -> list[float]:
    """One number for each result of each op, over all samples."""
    return [
        t.double().norm().item()
        for op in OPS.values()
        for sample in op.samples(torch.float32)
        for t in tensors(op.op(*sample.args, **sample.kwargs))
    ]


def test_twins_stand_in_without_the_core() -> None:
    """GAS_ENGINE_NATIVE=off: the same values, and one warning."""
    script = (
        "import warnings\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import test_every_op as t\n"
        "    values = t.fingerprint()\n"
        "assert t._native.native is None\n"
        "print(sum('gas_engine' in str(w.message) for w in caught), *map(repr, values))"
    )
    environment = {**os.environ, "GAS_ENGINE_NATIVE": "off", "PYTHONPATH": str(Path(__file__).parent)}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    warned, *values = map(float, run.stdout.split())
    assert warned == 1
    assert values == pytest.approx(fingerprint(), rel=1e-4, abs=1e-6)
