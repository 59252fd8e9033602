"""Learned few-step solvers as a scheduler of diffusers.

This file needs torch and diffusers, nothing else: ``save_pretrained`` puts a copy, ``gas_scheduler.py``, beside
``scheduler_config.json``, so that whoever gets the directory can use it.

    from gas_scheduler import GASScheduler  # or from gas_engine.export

    pipe.scheduler = GASScheduler.from_pretrained("scheduler")
    image = pipe(prompt, num_inference_steps=6, guidance_scale=7.5).images[0]
"""

import importlib
import math
import os
import shutil
import sys

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerOutput


class GASScheduler(SchedulerMixin, ConfigMixin):
    """The Generalized Solver (arXiv 2510.17699) in the place of any ODE scheduler; K = ``num_inference_steps``.

    A solver is data. With the states x and the network's outputs F so far, step n is::

        x[n+1] = sum_j A[n][j] x[j] + B[n][j] F[j]

    ``solvers`` maps every K to ``labels`` [K] (what the network is told: learned, with fractions), ``alphas`` and
    ``sigmas`` [K+1] (signal and noise of the states), and the rows ``A`` and ``B`` of two lower triangles, folded for
    networks of ``prediction_type``. What begins at a later node (img2img, inpainting with strength < 1, a refiner) has
    no history for the learned rows. There DPM-Solver++(2M) leads over the same nodes to the end: ``theory`` has its
    rows for steps 1 to K-1, by how many evaluations are there, and ``nodes`` [K] the labels of the nodes themselves,
    which ``set_begin_index`` then puts into ``timesteps``, because learned labels belong to learned rows.

    States are added up in float32 (float64 for float64 states) and come back in the sample's dtype; what rounding took
    from a half-precision state is kept for the next step. Memory: up to 2K states.

        scheduler = GASScheduler.from_solvers(["k4.safetensors", "k6.safetensors"], prediction="noise")
        scheduler.save_pretrained("scheduler")
    """

    # A pipeline saved with this scheduler names this module, and finds the file in its scheduler directory.
    __module__ = "gas_scheduler"
    _compatibles = [e.name for e in KarrasDiffusionSchedulers] + ["FlowMatchEulerDiscreteScheduler"]
    order = 1
    init_noise_sigma = 1.0

    _begin_index: int | None
    _step_index: int | None
    _states: list[torch.Tensor]
    _outputs: list[torch.Tensor]
    _lost: torch.Tensor | None  # by the rounding of the last state

    @register_to_config
    def __init__(self, solvers=None, prediction_type="epsilon", num_train_timesteps=1000):
        if not solvers:
            raise ValueError("this config holds no learned solvers; GASScheduler.from_solvers makes one that does")
        self._solvers = {int(steps): numbers for steps, numbers in solvers.items()}
        for steps, numbers in self._solvers.items():
            _check(steps, numbers)
        self.num_inference_steps = None
        self.timesteps = torch.empty(0)
        self._begin_index = None
        self._forget()

    @classmethod
    def from_solvers(cls, solvers, prediction):
        """A scheduler of solver files (or solvers in memory), one for each K, for networks that predict ``prediction``:
        "noise", "velocity", "flow" or "data". Needs gas_engine."""
        return cls(**importlib.import_module("gas_engine.export").for_diffusers(solvers, prediction))

    def save_config(self, save_directory, push_to_hub=False, **kwargs):
        """As ``ConfigMixin``'s, with this file beside the configuration."""
        if not os.path.isfile(save_directory):
            os.makedirs(save_directory, exist_ok=True)
            copy = os.path.join(save_directory, f"{self.__module__}.py")
            if not os.path.exists(copy) or not os.path.samefile(__file__, copy):
                shutil.copyfile(__file__, copy)
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    @property
    def step_index(self):
        """The number of the next step; None before the first."""
        return self._step_index

    @property
    def begin_index(self):
        """The step that sampling begins with, as a pipeline has set it."""
        return self._begin_index

    def set_begin_index(self, begin_index=0):
        """Begin at this step: pipelines call it for img2img and inpainting."""
        self._begin_index = int(begin_index)
        if self.num_inference_steps is not None:
            self._labels = self._numbers["nodes" if self._begin_index else "labels"]
            # In place: pipelines cut their part out of timesteps before they call this.
            self.timesteps.copy_(torch.tensor(self._labels))

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None):
        """Choose the solver of ``num_inference_steps`` evaluations and forget the last run.

        A learned solver brings its own times. Of ``sigmas`` the even grid that FLUX pipelines always pass is accepted
        for its length, and other sigmas or ``timesteps`` are refused; ``mu``, the shift for the size of the image, is
        ignored, because the learned times hold the shift that the solver was trained with.

        Raises ValueError for those, and for a K without a solver, with the K that there are.
        """
        if sigmas is not None:
            sigmas = [float(sigma) for sigma in sigmas]
            num_inference_steps = len(sigmas) if num_inference_steps is None else num_inference_steps
            even = [1 - i / max(len(sigmas), 1) for i in range(len(sigmas))]
            if any(abs(a - b) > 1e-4 for a, b in zip(sigmas, even)):  # noqa: B905 (equal lengths)
                raise ValueError(f"a learned solver brings its own times; leave out sigmas, which were {sigmas}")
        if timesteps is not None:
            raise ValueError(f"a learned solver brings its own times; leave out timesteps, which were {timesteps}")
        if num_inference_steps not in self._solvers:
            known = ", ".join(str(steps) for steps in sorted(self._solvers))
            raise ValueError(
                f"there is no learned solver of {num_inference_steps} steps; num_inference_steps must be one of {known}"
            )
        self.num_inference_steps = int(num_inference_steps)
        self._numbers = self._solvers[self.num_inference_steps]
        self._labels = self._numbers["labels"]
        self.timesteps = torch.tensor(self._labels, dtype=torch.float32, device=device)
        self._begin_index = None
        self._forget()

    def scale_model_input(self, sample, timestep=None):
        """The sample itself: the network sees states as they are."""
        return sample

    def step(self, model_output, timestep, sample, generator=None, return_dict=True, **kwargs):
        """The next state from the network's output at this one. Steps are counted; ``timestep`` says where sampling
        begins if no ``set_begin_index`` did. ``generator`` and further arguments are accepted and ignored.

        Raises ValueError before ``set_timesteps``, after the last step, and for a sample of another shape.
        """
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps before step")
        if self._step_index is None:
            begin = self._begin_index if self._begin_index is not None else self.index_for_timestep(timestep)
            self._step_index = self._start = begin
        n = self._step_index
        if n >= self.num_inference_steps:
            raise ValueError(f"all {self.num_inference_steps} steps are taken; call set_timesteps to begin again")
        if self._states and self._states[-1].shape != sample.shape:
            raise ValueError(
                f"the sample has shape {tuple(sample.shape)} after {tuple(self._states[-1].shape)}; "
                "call set_timesteps to begin again"
            )
        wide = torch.promote_types(sample.dtype, torch.float32)
        state = sample.to(wide)
        self._states.append(state if self._lost is None else state + self._lost.to(state.device))
        self._outputs.append(model_output.to(wide))
        a, b = self._row(n)
        new = torch.zeros_like(state)
        for weights, terms in ((a, self._states), (b, self._outputs)):
            for weight, term in zip(weights, terms[-len(weights) :]):  # noqa: B905 (equal lengths)
                new = new.add(term, alpha=weight) if weight else new
        prev_sample = new.to(sample.dtype)
        self._lost = None if sample.dtype == wide else new - prev_sample.to(wide)
        self._step_index = n + 1
        if n + 1 == self.num_inference_steps:
            self._states, self._outputs, self._lost = [], [], None
        # PixArt's one-step pipelines take the second entry, the estimate of the clean sample: the same with K = 1.
        single = self.num_inference_steps == 1
        return SchedulerOutput(prev_sample) if return_dict else (prev_sample,) * (1 + single)

    def index_for_timestep(self, timestep, schedule_timesteps=None):
        """The step whose label is nearest."""
        wanted = float(timestep)
        return min(range(len(self._labels)), key=lambda n: abs(self._labels[n] - wanted))

    def add_noise(self, original_samples, noise, timesteps):
        """``alpha x + sigma noise`` at the node of the next step, or, outside of a pipeline, of each label [B].

        Raises ValueError for a label that is not within one of the solver's: it knows noise levels at its nodes only.
        """
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps before add_noise")
        if self._begin_index is None:
            nodes = [self._node(timestep) for timestep in timesteps.flatten()]
        else:
            nodes = [self._begin_index if self._step_index is None else self._step_index] * len(timesteps)
        wide = torch.promote_types(original_samples.dtype, torch.float32)
        shape = (-1, *[1] * (original_samples.ndim - 1))
        device = original_samples.device
        alpha, sigma = (
            torch.tensor([self._numbers[name][node] for node in nodes], dtype=wide, device=device).reshape(shape)
            for name in ("alphas", "sigmas")
        )
        return (alpha * original_samples.to(wide) + sigma * noise.to(device, wide)).to(original_samples.dtype)

    def scale_noise(self, sample, timestep, noise=None):
        """``add_noise``, as pipelines of flow models call it."""
        return self.add_noise(sample, noise, timestep)

    def __len__(self):
        return self.config.num_train_timesteps  # type: ignore[attr-defined]

    def _forget(self):
        self._step_index, self._start = None, 0
        self._states, self._outputs, self._lost = [], [], None

    def _row(self, n):
        """Weights of the newest states and outputs, the newest last."""
        if self._start == 0:
            return self._numbers["A"][n], self._numbers["B"][n]
        rows = self._numbers["theory"][n - 1]
        row = rows[min(len(self._states), len(rows)) - 1]
        return row["A"], row["B"]

    def _node(self, timestep):
        node = self.index_for_timestep(timestep)
        if abs(self._labels[node] - float(timestep)) > 1:
            raise ValueError(f"noise can be added at {self._labels}, the solver's labels; got {float(timestep)}")
        return node


def _check(steps, numbers):
    """Raise ValueError unless the numbers are those of a solver of so many steps."""
    try:
        rows = [len(row) for name in "AB" for row in numbers[name]]
        theory = [list(map(len, (row["A"], row["B"]))) for variants in numbers["theory"] for row in variants[:1]]
        fits = (
            rows == [*range(1, steps + 1)] * 2
            and theory == [[1, 1]] * (steps - 1)
            and [len(numbers[name]) for name in ("labels", "nodes", "alphas", "sigmas")]
            == [steps] * 2 + [steps + 1] * 2
            and all(math.isfinite(v) for row in (numbers["labels"], *numbers["A"], *numbers["B"]) for v in row)
        )
    except (KeyError, TypeError, IndexError):
        fits = False
    if not fits:
        raise ValueError(f"the solver of {steps} steps is damaged: its numbers do not fit each other")


sys.modules.setdefault(GASScheduler.__module__, sys.modules[__name__])  # for pickle
