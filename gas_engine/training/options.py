"""The options of ``train``."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..teacher import TeacherSolver


@dataclass
class Config:
    """Learn a few-step solver for a frozen diffusion or flow model."""

    model: str = "digits"
    """The embedded digits, a .safetensors EDM network, or module:factory."""
    steps: int = 4
    """Network evaluations K of the student, 1 to 32."""
    student: Literal["gs", "s4s", "linear", "belm"] = "gs"
    """gs: corrections around DPM-Solver++ theory; s4s, linear: the forms without it; belm: reversible, two states."""
    order: int | None = None
    """Highest order; K unless given."""
    loss: Literal["l1", "l2", "lpips"] = "l1"
    """Distance to the teacher's samples."""
    memory_budget: str | None = None
    """Bytes of the device for tensors, such as 8GiB: chooses what follows, down to --loss-alone, for the least time."""
    checkpoint_every: int = 1
    """At most this many network graphs are alive; 0 keeps all."""
    trajectory: Literal["keep", "offload", "reversible"] = "keep"
    """Where the states wait for the way back: on the device, in host memory, or nowhere (--student belm)."""
    offload: bool = False
    """Short for --trajectory offload."""
    carry: bool = False
    """A reversible trajectory of float64 states instead of residual codes."""
    micro_batch: int | Literal["auto"] = "auto"
    """Samples at a time within an update, with the same gradient; auto is all of them, or what the budget allows."""
    lean: bool = False
    """Keep less in the network's graph (the EDM networks do so anyway)."""
    checkpoint_blocks: Literal["none", "auto", "all"] = "none"
    """Rebuild the network block by block as well."""
    loss_alone: bool = False
    """Let no network graph wait while the loss is taken."""
    weights: Literal["resident", "int8", "streamed"] = "resident"
    """Frozen weights on the device, in eight bits there (torchao), or in host memory, brought block by block."""
    # Speed of the frozen network.
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of its weights and arithmetic, in all of the run; states and times keep theirs. fp32 is as the model has them."""
    channels_last: bool = False
    """Lay out its images with their channels last."""
    compile: bool = False
    """Run it through torch.compile in updates."""
    cuda_graphs: bool = False
    """Replay its calls as CUDA graphs in updates, for small networks."""
    recipe: Literal["auto", "quick", "paper"] = "auto"
    """auto is quick for digits and paper for everything else."""
    iterations: int | None = None
    """Updates; the recipe's unless given."""
    batch: int | None = None
    """Samples per update; the recipe's unless given."""
    rate: float | None = None
    """Learning rate; the recipe's unless given."""
    optimizer: Literal["adam", "soap"] | None = None
    """Adam, or Adam in the eigenbasis of the gradients' covariance; the recipe's unless given."""
    ema: float | None = None
    """Decay of the average; the recipe's unless given."""
    start_grid: str | None = None
    """uniform, quadratic, logSNR, karras, or a JSON file of K+1 falling times; the recipe's unless given."""
    t_eps: float = 1e-3
    """Time at which the student stops."""
    teacher: TeacherSolver = field(default_factory=TeacherSolver)
    """The many-step solver to match."""
    train_seeds: str = "0-1399"
    """Seeds of the teacher set."""
    teacher_set: Path | None = None
    """Directory of the teacher set; made if missing. By default runs/teacher-MODEL-..."""
    out: Path | None = None
    """Run directory; by default runs/MODEL-STUDENT-kK, numbered if taken."""
    resume: bool = False
    """Continue the run in --out from its newest checkpoint, bit for bit."""
    save_every: int = 200
    """Updates between checkpoints."""
    sample_every: int = 200
    """Updates between sample grids."""
    log_every: int = 20
    """Updates between rows of metrics."""
    seed: int = 0
    """Order of the batches."""
    evaluation: Literal["full", "student"] = "full"
    """At the end, compare with every classical solver, or measure the student alone."""
    sample_batch: int = 128
    """Samples at a time in everything but training."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:0, ..."""


def plain(config: Config) -> dict[str, Any]:
    """The options as JSON says them."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))
