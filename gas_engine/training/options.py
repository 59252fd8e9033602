"""The options of ``train``."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..models import PlacedModelOptions
from ..teacher import TeacherSolver


@dataclass
class Config(PlacedModelOptions):
    """Learn a few-step solver for a frozen diffusion or flow model."""

    config: Path | None = None
    """A file of options, such as configs/cifar10.yaml; what is given beside it counts."""
    steps: int | str = 4
    """Network evaluations K of the student, 1 to 32; a range such as 4-10 learns one solver for every K in it."""
    student: Literal["gs", "s4s", "s4s-alt", "ld3", "bns", "dyweight", "belm"] = "gs"
    """gs: times and corrections around a solver's theory; s4s: multistep weights, times as they are; s4s-alt: weights
    and times in turn; ld3: times alone; bns: a free tableau; dyweight: weights of past gradients and times; belm:
    reversible, two states."""
    base: str | None = None
    """Classical solver to begin at, and of gs and ld3 to stay at: dpmpp3m unless given; dpmpp2m, euler, ipndm, deis,
    unipc, ..."""
    form: Literal["theory", "s4s", "linear"] | None = None
    """Of gs: corrections around theory, or S4S's or the linear multistep form of the same times."""
    order: int | None = None
    """Of gs, the longest history; K unless given."""
    degree: int | None = None
    """Of a range of K, that of the polynomials in K that its tables are: low shares much between K; the largest K less
    one, at most 12, unless given."""
    same_at_every_scale: bool = False
    """Of a range of guidance: learn one tableau for all its scales, as students but gs of full order do anyway."""
    loss: str = "l1"
    """Distance to the teacher's samples: l1, l2, huber, lpips, lpips-alex, lpips-squeeze, or 'lpips + 0.1 * l1'."""
    loss_chunk: int | None = None
    """Samples at a time within the loss, with the same gradient; 1 for LPIPS and all for others unless given."""
    loss_cache: str | None = None
    """Bytes of host memory, such as 4GiB, for features of the teacher's samples, which are then made once."""
    loss_in: Literal["auto", "states", "pixels"] = "auto"
    """Where a latent model's samples are compared: as they are, or decoded; auto decodes them for LPIPS."""
    loss_tile: int | None = None
    """Latents a side of tiles that are decoded one by one; approximate, where a decoder sees a whole sample at once."""
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
    checkpoint_blocks: Literal["none", "auto", "all", "nested"] = "none"
    """Rebuild the network block by block as well, from the inputs of all blocks, or nested from those of a few."""
    loss_alone: bool = False
    """Let no network graph wait while the loss is taken."""
    split_guidance: bool = False
    """Call the network for the two halves of guidance one after the other."""
    shard: bool = False
    """Spread the frozen weights over the processes of torchrun, for a network that does not fit one card."""
    # Speed of the frozen network.
    channels_last: bool = False
    """Lay out its images with their channels last."""
    compile: bool = False
    """Run it through torch.compile in updates."""
    cuda_graphs: bool = False
    """Replay its calls as CUDA graphs in updates, for small networks."""
    recipe: Literal["auto", "quick", "paper"] = "auto"
    """auto is quick for digits, guided or not, and paper for everything else."""
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
    """Seeds of the teacher set; the paper takes 1,400, and 5,000 for GAS beyond CIFAR-10."""
    teacher_set: Path | None = None
    """Directory of the teacher set; made if missing. By default runs/teacher-MODEL-... Or a published dataset.pkl, of
    which --train-seeds names rows."""
    out: Path | None = None
    """Run directory; by default runs/MODEL-STUDENT-kK, numbered if taken."""
    resume: bool | Literal["auto"] = False
    """Continue the run in --out from its newest whole checkpoint, bit for bit; auto: or start it if there is none."""
    save_every: int = 200
    """Updates between checkpoints."""
    sample_every: int = 200
    """Updates between sample grids."""
    log_every: int = 20
    """Updates between rows of metrics."""
    seed: int = 0
    """Of the order of the batches, a new discriminator's weights, and what a network itself draws."""
    # Adversarial training.
    adversarial: bool = False
    """Train against a discriminator as well, which is trained beside the solver (GAS)."""
    adversarial_weight: float | None = None
    """Of the adversarial loss beside the distance; the recipe's unless given (paper: 0.1 for 3x32x32, 1 for others)."""
    adversarial_loss: Literal["relativistic", "non_saturating", "plain"] = "relativistic"
    """How the discriminator's logits become losses."""
    discriminator: Path | None = None
    """A published R3GAN snapshot (.pkl) to begin with; random weights of a size that fits the model unless given."""
    discriminator_rate: float | None = None
    """Learning rate of the discriminator; the recipe's unless given."""
    discriminator_precision: Literal["fp32", "bf16"] = "fp32"
    """That the discriminator computes in; its weights stay fp32."""
    discriminator_micro_batch: int | None = None
    """Pairs of samples at a time in the discriminator's step, with the same gradient; chosen unless given."""
    gamma: float | None = None
    """Of the gradient penalties on real and fake samples; the recipe's unless given."""
    penalty: Literal["piecewise", "forward_over_reverse", "double_backward", "random_direction"] = "piecewise"
    """How the penalties' gradient is made: exactly but by the last; the first is the fastest."""
    fakes: Literal["fresh", "reuse"] = "fresh"
    """Samples that the discriminator sees: from fresh noise, or those of the update before, which saves K evaluations
    and pairs them with the teacher's samples of the same noise."""
    warm_up: int = 0
    """Updates without the discriminator before those with it."""
    start_from: Path | None = None
    """A solver file of the same kind and K to begin with."""
    compare: tuple[Path, ...] = ()
    """Solver files to measure beside the result, such as one trained without --adversarial."""
    # Long runs.
    rate_schedule: Literal["constant", "cosine", "linear"] | None = None
    """Course of the learning rate over the run; the recipe's unless given."""
    rate_warm_up: int = 0
    """Updates over which the learning rate rises to its value."""
    clip: float = 1.0
    """Largest norm of a gradient; inf for no bound."""
    evaluate_every: int = 200
    """Updates between measurements of the averaged solver on seeds that are not trained on; 0: none."""
    patience: int = 0
    """Measurements without a smaller distance after which to stop, with the nearest averaged solver; 0: never."""
    keep: int = 3
    """Newest checkpoints to keep, at least 2, beside the nearest to the teacher."""
    max_skipped: int = 20
    """Updates in a row with a loss or gradient that is not finite before going back, with half the learning rate."""
    max_rollbacks: int = 3
    """Times to go back before the run stops."""
    logger: Literal["tensorboard", "wandb", "trackio", "none"] = "tensorboard"
    """Where rows of metrics go besides metrics.jsonl."""
    selection: int = 64
    """Samples that measurements during the run are taken of."""
    held_out: int = 512
    """Samples that the result is measured on."""
    evaluation: Literal["full", "student"] = "full"
    """At the end, compare with every classical solver, or measure the student alone."""
    pictures: bool = True
    """Draw samples on the way, at the end what was learned and what it makes, and write the report's page."""
    sample_batch: int = 128
    """Samples at a time in everything but training; fewer where --memory-budget has no room for them."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:0, ..."""


def plain(config: Config) -> dict[str, Any]:
    """The options as JSON says them."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))
