"""What one rank of two does in test_distributed.py, told by torchrun's variables: ``python ranks.py DIRECTORY``.

Everything in one start, since importing is what takes long; what it found goes to DIRECTORY/rank-0.pt and rank-1.pt.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import toy

from gas_engine import Denoiser, EDMDenoiser, GeneralizedSolver, MemoryPolicy, teacher, train
from gas_engine.architectures import architecture
from gas_engine.comparison import Samples, classical_distances, distance
from gas_engine.distributed import ALONE, Group
from gas_engine.execution import Execution
from gas_engine.gradients import loss_backward
from gas_engine.losses import distillation_loss
from gas_engine.memory import checkpoint_blocks, lean, shard_weights
from gas_engine.networks import discriminator_for
from gas_engine.solvers.named import named_solver
from gas_engine.training import batches, setup, trainer
from gas_engine.training.adversary import Adversarial, Adversary
from gas_engine.training.recipe import Recipe
from gas_engine.training.trainer import Trainer

ITERATIONS = 20


def short_evaluation() -> None:
    setup.SELECTION_SEEDS, setup.HELD_OUT_SEEDS = range(40_000, 40_008), range(50_000, 50_016)


def options(directory: Path, out: str, *more: str) -> list[str]:
    return [
        "--model", "toy:make", "--steps", "2", "--recipe", "quick", "--train-seeds", "0-31", "--batch", "5",
        "--teacher-set", str(directory / "train-set"), "--out", str(directory / out), "--iterations", "6",
        "--save-every", "3", "--sample-every", "6", "--log-every", "2", "--device", "cpu", "--sample-batch", "8",
        "--evaluation", "student", *more,
    ]  # fmt: skip


def teacher_options(directory: Path, out: str) -> list[str]:
    seeds = ["--seeds", "0-49", "--batch", "8", "--shard", "20"]
    return ["--model", "toy:make", *seeds, "--out", str(directory / out), "--device", "cpu"]


def toy_trainer(batch: int, group: Group, denoiser: Denoiser | None = None, iterations: int = ITERATIONS) -> Trainer:
    denoiser = denoiser or toy.mixture()
    recipe = Recipe(iterations, batch, rate=1e-2, rate_schedule="cosine", ema=0.9, start_grid="")
    solver, targets = GeneralizedSolver(3, denoiser.schedule, start="quadratic"), toy.noise(10).cos()
    return Trainer(
        denoiser, solver, list(range(10)), targets, distillation_loss("l1"), recipe, Execution(), group=group
    )


def flat(solver: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in solver.parameters()])


def in_float64() -> contextlib.AbstractContextManager[Any]:
    """Noise of seeds as float64."""
    original, patched = trainer.seeded, contextlib.ExitStack()
    for module in (trainer, batches):
        module.seeded = lambda denoiser, seeds, **_: (original(denoiser, seeds)[0].double(), None)
        patched.callback(setattr, module, "seeded", original)
    return patched


def twenty_updates(group: Group) -> dict[int, dict[str, torch.Tensor]]:
    """First gradient, losses and last parameters for an even batch, an odd one, and one that leaves a rank idle."""
    found = {}
    with in_float64():
        for batch in (4, 5, 1):
            fit = toy_trainer(batch, group)
            part = fit.batches.at(0)
            group.mean_(fit.solver.parameters(), fit._gradient(part, None), part.share)
            gradient = torch.cat([p.grad.flatten() for p in fit.solver.parameters()])
            losses = torch.stack([loss.double() for _, loss in fit])
            found[batch] = {"gradient": gradient, "losses": losses, "solver": flat(fit.solver)}
    return found


def shortage(group: Group, stricken: int) -> dict[str, Any]:
    """Memory runs out on one rank: all go on with less."""
    inner, calls = toy.mixture(), []

    class Small(torch.nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor, cond: Any) -> torch.Tensor:
            calls.append(1)
            if group.rank == stricken and len(calls) == 10:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return inner(x, t, cond)

    fit = toy_trainer(4, group, Denoiser(Small(), inner.schedule, "data", toy.SHAPE), iterations=4)
    for _ in fit:
        pass
    return {"notices": fit.notices, "solver": flat(fit.solver)}


def skipped(group: Group, stricken: int) -> dict[str, Any]:
    """A loss that is not finite on one rank: all skip."""
    fit, calls = toy_trainer(4, group, iterations=4), []
    loss = fit.loss

    def broken(x: torch.Tensor, y: torch.Tensor, rows: list[int]) -> torch.Tensor:
        calls.append(1)
        return loss(x, y) * (torch.nan if group.rank == stricken and len(calls) == 2 else 1.0)

    fit.loss = broken
    for _ in fit:
        pass
    return {"skipped": fit.skipped, "solver": flat(fit.solver)}


def adversarial(group: Group) -> dict[str, dict[str, torch.Tensor]]:
    """Six updates against a discriminator, of batches that do not divide evenly, its state taken over half way; of one
    row, a rank is idle."""

    def network(x: torch.Tensor, t: torch.Tensor, cond: Any) -> torch.Tensor:
        return torch.tanh(x * (1 + t.to(x.dtype)) + 0.1 * x.flip(-1))

    shape, schedule = (1, 8, 8), toy.mixture().schedule
    denoiser = Denoiser(network, schedule, "data", shape)

    def made(fakes: Any, batch: int) -> Trainer:
        torch.manual_seed(3)
        adversary = Adversary(discriminator_for(shape).double(), Adversarial(1.0, 1e-3, fakes=fakes))
        solver = GeneralizedSolver(3, schedule, start="quadratic")
        targets = torch.linspace(-1, 1, 640, dtype=torch.float64).view(10, *shape)
        recipe = Recipe(6, batch, 1e-2, "cosine", ema=0.9, start_grid="")
        return Trainer(
            denoiser, solver, list(range(10)), targets, distillation_loss("l1"), recipe, Execution(),
            adversary=adversary, group=group,
        )  # fmt: skip

    found = {}
    with in_float64():
        for fakes, batch in (("fresh", 5), ("reuse", 5), ("fresh", 1), ("reuse", 1)):
            fit, on = made(fakes, batch), made(fakes, batch)
            for _ in range(3):
                fit.update()
            on.load(3, *fit.state())
            for _ in on:
                pass
            assert on.adversary is not None
            read = torch.tensor([*on.means.read(group).values()])
            found[f"{fakes} {batch}"] = {
                "solver": flat(on.solver),
                "critic": flat(on.adversary.discriminator),
                "read": read,
            }
    return found


def discriminator(group: Group) -> list[torch.Tensor]:
    """Gradients of a mean over 5 rows, 3 of them on the rank of the larger part, in buckets smaller than a weight."""
    torch.manual_seed(group.rank)
    network = torch.nn.Sequential(torch.nn.Linear(18, 7), torch.nn.Linear(7, 1).double()).requires_grad_()
    group.broadcast_(network)
    rows = toy.noise(5).flatten(1)[group.part(5)]
    network[1](network[0](rows.float()).double()).square().mean().backward()
    group.mean_gradients_(network, len(rows) / 5, bucket_bytes=100)
    gradients = [p.grad.clone() for p in network.parameters()]
    for p in network.parameters():
        p.grad = None if group.rank else p.grad
    group.mean_gradients_(network, 0.0 if group.rank else 1.0)  # a rank with no rows
    return gradients + [p.grad for p in network.parameters()]


def evaluation(group: Group) -> list[Any]:
    """One solver in parts, and every classical one."""
    denoiser = toy.mixture()
    data = Samples.of(denoiser, range(20), torch.zeros(20, *toy.SHAPE), torch.device("cpu"))
    tableau = named_solver("unipc3-bh1", denoiser.schedule, 3)
    mine = distance(denoiser, tableau, data, "mine", batch=8, group=group)
    return [mine, *classical_distances(denoiser, 3, data, data, 8, group=group)]


def held(network: torch.nn.Module) -> int:
    """Bytes of weights on this rank."""
    return sum(getattr(p, "_local_tensor", p).nbytes for p in network.parameters())


def sharded(group: Group) -> dict[str, dict[str, Any]]:
    """Gradients of a network in parts beside those of the whole, seen in different ways, with graphs kept and not."""
    views: dict[str, Callable[[Any], Any]] = {
        "plain": lambda d: d, "lean": lean, "blocks": checkpoint_blocks, "both": lambda d: checkpoint_blocks(lean(d)),
    }  # fmt: skip
    found = {}
    for name, seen, memory in (
        ("perceptron", "plain", MemoryPolicy(1)), ("perceptron", "lean", MemoryPolicy(2)),
        ("perceptron", "blocks", MemoryPolicy(1, "offload", loss_alone=True)),
        ("perceptron", "both", MemoryPolicy(0)), ("tied", "plain", MemoryPolicy(1)), ("unet", "both", MemoryPolicy(1)),
    ):  # fmt: skip
        torch.manual_seed(0)
        whole = architecture("cifar10").denoiser(small=True) if name == "unet" else toy.make_perceptron()
        if name == "tied":  # like the embeddings of some transformers
            whole.function.layers[1].up = whole.function.layers[0].up
        whole = views[seen](whole.requires_grad_(False))
        assert isinstance(whole, Denoiser | EDMDenoiser) and whole.shape is not None
        noise = torch.randn(4, *whole.shape)[group.part(4)]
        solver = GeneralizedSolver(3, whole.schedule, start="quadratic")

        def gradient(denoiser: Denoiser, noise=noise, solver=solver, memory=memory) -> torch.Tensor:
            solver.zero_grad()
            tableau = solver.tableau(denoiser.prediction)
            loss_backward(denoiser, noise, tableau, lambda y, rows: y.square().flatten(1).mean(1), None, memory, 1)
            return torch.cat([p.grad.flatten() for p in solver.parameters()])

        parts = shard_weights(whole, "cpu")
        found[f"{name} {seen}"] = {
            "wanted": gradient(whole),
            "found": [gradient(parts), gradient(parts)],
            "share": held(parts) / held(whole),
        }
    return found


def refusals(group: Group) -> list[str]:
    """What is said where ranks differ, and where rank 0 refuses."""
    said = []
    try:
        group.check_same({"theta": torch.ones(2) * (1 + group.rank)}, "update 7")
    except ValueError as error:
        said.append(str(error))
    try:
        group.first(lambda: (_ for _ in ()).throw(ValueError("no")))
    except (ValueError, SystemExit) as error:
        said.append(repr(error))
    return said


@contextlib.contextmanager
def trouble(name: str) -> Iterator[None]:
    """For this process alone: SIGTERM within update 4, or losses of updates 5 and 6 that are not finite."""
    original, calls = Trainer.update, []

    def update(self: Trainer) -> torch.Tensor:
        calls.append(1)
        if name == "stopped" and len(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        loss = self.loss
        if name == "not-finite" and len(calls) in (5, 6):
            self.loss = lambda *given: loss(*given) * torch.nan
        try:
            return original(self)
        finally:
            self.loss = loss

    Trainer.update = update  # type: ignore[method-assign]
    try:
        yield
    finally:
        Trainer.update = original  # type: ignore[method-assign]


def verbs(directory: Path, ports: list[str]) -> dict[str, str]:
    """The command line; every call meets at a port of its own. What it printed, and its exit code."""
    short_evaluation()
    said = {}
    for name, verb, arguments in (
        ("teacher", teacher, teacher_options(directory, "set-of-two")),
        ("train", train, options(directory, "two")),
        ("resume", train, ["--out", str(directory / "resumed-by-two"), "--resume", "--device", "cpu"]),
        ("shard", train, options(directory, "parts", "--model", "toy:make_perceptron", "--batch", "4", "--shard",
                                 "--teacher-set", str(directory / "parts-set"))),
        ("not-finite", train, options(directory, "not-finite", "--max-skipped", "2")),
        ("stopped", train, options(directory, "stopped")),
        ("odd", train, options(directory, "odd", "--shard", "--model", "toy:make_perceptron")),
        ("taken", train, options(directory, "two")),
    ):  # fmt: skip
        os.environ["MASTER_PORT"] = ports.pop()
        heard, code = io.StringIO(), 0
        own = trouble(name) if os.environ["RANK"] == "1" else contextlib.nullcontext()
        with own, contextlib.redirect_stdout(heard), contextlib.redirect_stderr(heard):
            try:
                verb.main(arguments)
            except SystemExit as stop:
                code = stop.code
        said[name] = f"{code}: {heard.getvalue()}"
    return said


def main(directory: Path, ports: list[str]) -> None:
    os.environ["MASTER_PORT"] = ports.pop()
    with Group.from_environment() as group:
        found = {
            "updates": twenty_updates(group), "adversarial": adversarial(group),
            "shortage": shortage(group, 1), "skipped": skipped(group, 0),
            "discriminator": discriminator(group), "evaluation": evaluation(group), "refusals": refusals(group),
            "map": replace(group, lockstep=True).map(lambda item: (item, group.rank), range(5)),
            "any": [group.any(group.rank == 1), group.any(False)], "sharded": sharded(group),
        }  # fmt: skip
    found["verbs"] = verbs(directory, ports)
    torch.save(found, directory / f"rank-{group.rank}.pt")
    os.environ["MASTER_PORT"] = ports.pop()
    train.main(options(directory, "killed", "--iterations", "1000000"))  # until one rank is killed


if __name__ == "__main__":
    assert ALONE.main
    main(Path(sys.argv[1]), sys.argv[2:])
