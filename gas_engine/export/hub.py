"""A training run as a repository for the Hugging Face Hub: solver, scheduler, ComfyUI folder, and a card with its table
and pictures."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._cli import InputError, writable
from ..files import atomic, write_text
from ..solvers import LearnedTimes, load_solver, save_solver
from ..solvers.files import write_readable
from ..solvers.named import FAMILIES as CLASSICAL
from .directories import write_comfyui, write_diffusers

PICTURES = {
    "comparison.png": "Teacher, learned and classical samples on seeds that were not trained on",
    "schedule.png": "Learned times beside the usual grids",
    "tableau.png": "The learned coefficients beside those of theory",
    "history.png": "Times and coefficients over training",
}


def write_hub(run: Path, out: Path, prediction: str | None) -> Path:
    """Everything for ``huggingface_hub.upload_folder``: README.md (the card), solver.safetensors, solver.json,
    scheduler/ (for networks of diffusers, where ``prediction`` is given), comfyui/gas_solver/, and the run's pictures.

    Raises ValueError for a directory that is no finished run.

        write_hub(Path("runs/sd"), Path("hub"), "noise")
    """
    solver = finished(run)
    facts = {name: value for name, value in solver.facts.items() if name not in solver.config()}
    writable(out)
    save_solver(solver, out / "solver.safetensors", **facts)
    write_readable(solver, out / "solver.json", **facts)
    write_comfyui(solver, out / "comfyui" / "gas_solver")
    if prediction is not None:
        write_diffusers(solver, prediction, out / "scheduler")
    pictures = [name for name in PICTURES if (run / name).exists()]
    for name in pictures:
        with atomic(out / name) as temporary:
            shutil.copyfile(run / name, temporary)
    with open(run / "comparison.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    config = json.loads((run / "config.json").read_text()) if (run / "config.json").exists() else {}
    write_text(out / "README.md", card(solver, rows, config, pictures, diffusers=prediction is not None))
    return out


def finished(run: Path) -> LearnedTimes:
    """The solver of a run. Raises InputError for a directory that is no finished run."""
    if not (run / "solver.safetensors").exists() or not (run / "comparison.csv").exists():
        raise InputError(f"{run} is no finished run: it must hold solver.safetensors and comparison.csv")
    solver = load_solver(run / "solver.safetensors")
    if len(solver.steps_range) > 1:
        raise InputError(f"a card is of one K, and {run} learned several; write a file of one with convert --steps")
    if solver.guidance_range is not None:
        raise InputError(
            f"a card is of one scale, and {run} learned a range; write a file of one with convert --guidance"
        )
    return solver


def push_to_hub(directory: Path | str, repo_id: str, **options: Any) -> str:
    """Create the repository if it is not there and upload the directory; return the commit's address.

    ``options`` go to ``HfApi.upload_folder`` (``commit_message``, ``token``, ...). Raises ValueError without
    huggingface_hub.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise ValueError("the Hub needs huggingface_hub: `pip install huggingface_hub`") from None
    api = HfApi(token=options.pop("token", None))
    api.create_repo(repo_id, exist_ok=True)
    return str(api.upload_folder(repo_id=repo_id, folder_path=str(directory), **options))


def card(
    solver: LearnedTimes,
    rows: list[dict[str, str]],
    config: Mapping[str, Any],
    pictures: list[str],
    diffusers: bool,
) -> str:
    """The model card: Markdown under a YAML header."""
    steps, model = solver.steps, _public(str(solver.facts.get("model", "a frozen network")))
    guidance = solver.facts.get("guidance", 1.0)
    count = sum(parameter.numel() for parameter in solver.parameters())
    parts = [
        _header(model, diffusers),
        f"# {steps}-step solver for {model}\n",
        f"A sampler of {steps} network evaluations for the frozen network `{model}`: {count} learned numbers (times, "
        "coefficients, and the times that the network is told), no change of its weights. It was learned with "
        "gas_engine as the Generalized Solver of [arXiv 2510.17699](https://arxiv.org/abs/2510.17699)"
        f"{_trained(solver, config)}.\n",
        f"## Distance to the teacher at {steps} evaluations\n",
        _table(rows),
        _teacher(rows, config),
    ]
    parts += [f"![{PICTURES[name]}]({name})\n" for name in pictures[:1]]
    parts += ["## Use\n", _use_here(model, guidance, config)]
    if diffusers:
        parts.append(_use_diffusers(steps, model, guidance))
    parts.append(_use_comfyui(steps, solver.schedule.kind == "vp_discrete"))
    parts += ["## The solver\n", _times(solver)]
    parts += [f"![{PICTURES[name]}]({name})\n" for name in pictures[1:]]
    return "\n".join(parts)


def _header(model: str, diffusers: bool) -> str:
    tags = [
        "diffusion",
        "ode-solver",
        "few-step-sampling",
        "gas_engine",
        *(["diffusers"] if diffusers else []),
        "comfyui",
    ]
    lines = ["---", "# license: yours to choose", "library_name: gas_engine", "tags:", *(f"- {tag}" for tag in tags)]
    if _is_hub_id(model):
        lines.append(f"base_model: {model}")
    return "\n".join([*lines, "---", ""])


def _public(model: str) -> str:
    """The model as others know it: a Hub id as it is, a path without its directories."""
    return model if _is_hub_id(model) else Path(model).name


def _is_hub_id(model: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model) is not None and not Path(model).exists()


def _trained(solver: LearnedTimes, config: Mapping[str, Any]) -> str:
    facts = solver.facts
    said = [f"loss `{facts['loss']}`"] if facts.get("loss") else []
    if config.get("adversarial"):
        said.append("an adversarial loss")
    guidance = facts.get("guidance", 1.0)
    if isinstance(guidance, (list, tuple)):
        said.append(f"guidance from {guidance[0]:g} to {guidance[1]:g}")
    elif guidance != 1.0:
        said.append(f"guidance {guidance:g}")
    return f", with {', '.join(said)}" if said else ""


def _table(rows: list[dict[str, str]]) -> str:
    """The run's comparison, without columns that hold nothing."""
    heads = {"solver": "solver", "setting": "setting", "l1": "L1", "rmse": "RMSE", "psnr": "PSNR, dB"}
    heads |= {"fd_data": "FD to data", "fd_teacher": "FD to teacher"}
    kept = {name: head for name, head in heads.items() if any(row.get(name) for row in rows)}
    lines = [list(kept.values()), ["---"] * len(kept)]
    lines += [[row.get(name, "").replace("|", "\\|") for name in kept] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _teacher(rows: list[dict[str, str]], config: Mapping[str, Any]) -> str:
    teacher = config.get("teacher")
    if not isinstance(teacher, Mapping):
        return ""
    said = f"The teacher is {teacher.get('solver')} with {teacher.get('steps')} evaluations; the seeds of this table "
    said += "were not trained on."
    if any(row.get("solver") in CLASSICAL for row in rows):
        said += " Each classical solver stands with the best of its variants, grids and end times."
    return said + "\n"


def _use_here(model: str, guidance: Any, config: Mapping[str, Any]) -> str:
    said = f" --guidance {guidance:g}" if isinstance(guidance, (int, float)) and guidance != 1.0 else ""
    said += ' --prompts "a photo of a cat"' if config.get("prompts") else ""
    model = _public(str(config.get("model", model)))
    return f"""In a copy of this directory, with gas_engine:

```sh
gas-engine sample --model {model}{said} --solver solver.safetensors --seeds 0-7 --out samples
```
"""


def _use_diffusers(steps: int, model: str, guidance: Any) -> str:
    scale = f", guidance_scale={guidance:g}" if isinstance(guidance, (int, float)) and guidance != 1.0 else ""
    return f"""With diffusers, without gas_engine (`scheduler/gas_scheduler.py` needs torch and diffusers only):

```python
import sys

from diffusers import DiffusionPipeline

sys.path.insert(0, "scheduler")
from gas_scheduler import GASScheduler

pipe = DiffusionPipeline.from_pretrained("{model}")
pipe.scheduler = GASScheduler.from_pretrained("scheduler")
pictures = pipe(..., num_inference_steps={steps}{scale}).images
```

`num_inference_steps` must be {steps}. Image-to-image and inpainting with a strength below 1 go on with
DPM-Solver++(2M) over the learned times.
"""


def _use_comfyui(steps: int, whole_labels: bool) -> str:
    rounded = "ComfyUI tells this model whole labels, so its samples differ a little from those of other programs.\n"
    return f"""With ComfyUI, copy `comfyui/gas_solver` into `ComfyUI/custom_nodes`: the node "Learned solver" gives
SAMPLER and SIGMAS for SamplerCustom, and every KSampler has the sampler `gas`, with {steps} steps and any scheduler.
{rounded if whole_labels else ""}With k-diffusion, `sample_gas(model, x, sigmas, solver="solvers.json")` in that
folder's `k_diffusion.py` is a sampler like its own.
"""


def _times(solver: LearnedTimes) -> str:
    times, told = solver.times().tolist(), solver.told_times().tolist()
    cells = [("n", "time of the state", "time that the network is told")]
    cells += [(str(n), f"{t:.6f}", f"{told[n]:.6f}" if n < solver.steps else "") for n, t in enumerate(times)]
    cells.insert(1, ("---",) * 3)
    table = "".join(f"| {' | '.join(line)} |\n" for line in cells)
    return f"{table}\n`solver.json` has all of its numbers, coefficients included.\n"
