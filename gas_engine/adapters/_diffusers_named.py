"""Networks that nothing here knows, called by the names of what their forward takes."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures.wrappers import LABELS, DiffusersFunction
from ..schedule import Schedule

_SHORT = {"text": "encoder_hidden_states", "pooled": "pooled_projections", "mask": "encoder_attention_mask"}


class NamedFunction(DiffusersFunction):
    """Any network whose forward takes a state, ``timestep``, and things by name; cond: a dict of those [B, ...].

    ``text``, ``pooled`` and ``mask`` are short for its ``encoder_hidden_states``, ``pooled_projections`` and
    ``encoder_attention_mask``. Raises ValueError for what its forward does not take or takes and was not given, and
    where a network in bfloat16 or float16 rounds its label before it makes sines of it.
    """

    def __init__(self, network: nn.Module, schedule: Schedule, labels: float = LABELS) -> None:
        super().__init__(network, schedule, labels)
        self.kind = type(network).__name__
        _, state, *others = inspect.signature(type(network).forward).parameters.values()
        self.state, self.takes = state.name, {p.name: p.default is p.empty for p in others}
        if self.state not in ("sample", "hidden_states") or "timestep" not in self.takes:
            raise ValueError(f"{self.kind} takes {self.state!r}, where a denoiser takes a state and 'timestep'")
        for name in ("img_ids", "img_shapes", "num_frames"):
            if name in self.takes:
                raise ValueError(f"{self.kind} takes {name!r}: its states are packed, or videos, which is not served")
        self.checked: set[torch.dtype] = set()

    def call(self, x: Tensor, label: Tensor, cond: Any) -> Tensor:
        given = {_SHORT.get(name, name): value for name, value in (cond or {}).items()}
        given |= {self.state: x, "timestep": label}
        unknown = next((name for name in given if name not in (self.state, *self.takes)), None)
        if unknown is not None:
            raise ValueError(f"{self.kind} takes no {unknown!r}; it takes {', '.join(self.takes)}")
        missing = next((name for name, needed in self.takes.items() if needed and name not in given), None)
        if missing is not None:
            said = ", ".join(cond or ["nothing"])
            raise ValueError(f"{self.kind} needs {missing!r} in its condition, which has {said}")
        with contextlib.nullcontext() if x.dtype in self.checked else self._watched(len(x)):
            output = self.network(**given, return_dict=False)[0]
        self.checked.add(x.dtype)
        return output

    @contextlib.contextmanager
    def _watched(self, batch: int) -> Iterator[None]:
        """Sees that one number a sample arrives with its digits where sines are made of it."""

        def whole(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args[0].dtype.itemsize < 4 and args[0].shape == (batch,):
                raise ValueError(
                    f"{self.kind} rounds its time label to {str(args[0].dtype).removeprefix('torch.')}, which loses "
                    "the times that a solver learns; run it in float32"
                )

        embedders = (m for m in self.network.modules() if type(m).__name__ == "Timesteps")
        hooks = [m.register_forward_pre_hook(whole) for m in embedders]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
