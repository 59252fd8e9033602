"""Prompts -> embeddings by a pipeline's own text encoders, once: after that they are rows of files.

Chunks of texts are files of their own, named by all that their numbers depend on, so an interrupted run goes on where
it was and a longer list of prompts encodes what is new.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import inspect
import json
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .._cli import progress
from ..architectures.wrappers import quiet
from ..files import atomic, tensors_sha256
from ..units import show_bytes

FORMAT = "gas_engine.prompts/1"
CHUNK, BATCH = 128, 16  # texts of a file, and of a run of the encoders
NEEDED = ["model_index.json", "*/*config.json", "tokenizer*/*", "text_encoder*/*.safetensors*"]

Row = dict[str, Tensor]


class TextEncoders:
    """The text encoders of a saved pipeline, with a cache; they are loaded when a text is met that is not in it.

    ``encode(texts)`` gives the files of the texts' embeddings, ``null(negative)`` what guidance leads away from. The
    files are in ``$GAS_ENGINE_CACHE``, else ``$XDG_CACHE_HOME/gas_engine``, else ``~/.cache/gas_engine``. ``dtype``: of
    the encoders and what is kept, as they were saved unless given. ``length``: tokens of a text for T5, those of the
    pipeline's own call unless given. Memory: the encoders while they run, on ``device`` (unless given: a CUDA device if
    they fit there), and one file of 128 texts.
    """

    def __init__(
        self, directory: Path, dtype: torch.dtype | None = None, device: torch.device | str | None = None,
        length: int | None = None,
    ) -> None:  # fmt: skip
        self.directory, self.dtype, self.length = directory, dtype, length
        parts = [p for pattern in ("tokenizer*", "text_encoder*") for p in sorted(directory.glob(pattern))]
        files = [file for part in parts for file in sorted(part.rglob("*")) if file.is_file()]
        self.files = [directory / "model_index.json", *files]
        self.device = torch.device(device) if device is not None else self._device()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the encoders' files: names, sizes, and of each the first MiB and 64 places behind it."""
        digest = hashlib.sha256(f"{FORMAT} {self.dtype} {self.length}".encode())
        for path in self.files:
            size = path.stat().st_size
            digest.update(f"{path.relative_to(self.directory)} {size}".encode())
            with path.open("rb") as file:
                digest.update(file.read(2**20))
                for n in range(64 if size > 2**20 else 0):
                    file.seek(2**20 + n * (size - 2**20) // 64)
                    digest.update(file.read(4096))
        return digest.hexdigest()

    def encode(self, texts: Sequence[str]) -> list[Path]:
        """Files of the embeddings of every ``CHUNK`` texts, in order: "text" [n, L, E], and what the model has beside
        ("pooled" [n, P], "mask" [n, L])."""
        chunks = [list(texts[n : n + CHUNK]) for n in range(0, len(texts), CHUNK)]
        paths = [self._path(["texts", *chunk]) for chunk in chunks]
        with self._locked():
            missing = [n for n, path in enumerate(paths) if not _whole(path)]
            if missing:
                with progress() as bar:
                    task = bar.add_task("encoding prompts", total=sum(len(chunks[n]) for n in missing), note="")
                    for n in missing:
                        rows: list[Row] = []
                        for start in range(0, len(chunks[n]), BATCH):
                            rows.append(self._call(chunks[n][start : start + BATCH])[0])
                            size = sum(v[0].nbytes for v in rows[0].values())
                            bar.update(task, advance=len(rows[-1]["text"]), note=f"{show_bytes(size)} a prompt")
                        _write(paths[n], {name: torch.cat([row[name] for row in rows]) for name in rows[0]})
        return paths

    def null(self, negative: str) -> Row:
        """What the pipeline's own guidance takes for a negative prompt, or for none where that is empty; batch 1."""
        path = self._path(["negative", negative])
        with self._locked():
            if not _whole(path):
                _write(path, self._call([""], negative)[1])
        return load_file(path)

    def release(self) -> None:
        """Drop the encoders' weights."""
        self.__dict__.pop("pipeline", None)

    @cached_property
    def pipeline(self) -> Any:
        """The pipeline without its denoiser and its decoder."""
        try:
            import transformers  # noqa: F401
            from diffusers import DiffusionPipeline
        except ImportError as error:
            raise ValueError(
                f"encoding prompts needs diffusers and transformers ({error}): pip install diffusers transformers"
            ) from None
        index = json.loads((self.directory / "model_index.json").read_text())
        without = {
            name: None
            for name, value in index.items()
            if isinstance(value, list) and not name.startswith(("tokenizer", "text_encoder"))
        }
        for name, value in index.items():
            if not isinstance(value, list) or not value[0] or not name.startswith(("tokenizer", "text_encoder")):
                continue
            if value[0] != "transformers":
                raise ValueError(
                    f"the {name} of {self.directory} is {value[1]} of {value[0]!r}, code that is not run; it must be "
                    "of transformers"
                )
            # Of which transformers makes an empty one, and reads on.
            if name.startswith("tokenizer") and not _has_words(self.directory / name):
                raise ValueError(
                    f"{self.directory / name} is not whole: it has no tokenizer.json, *.model, or vocab.json with "
                    "merges.txt; get the pipeline again"
                )
        names = [file.name for file in self.files if file.suffix == ".safetensors"]
        whole = not names or any(name.count(".") == 1 for name in names)
        variant = None if whole else names[0].split(".")[1].split("-")[0]  # model.fp16.safetensors and nothing else
        with _silent():
            try:
                pipeline = DiffusionPipeline.from_pretrained(
                    self.directory, variant=variant, use_safetensors=True, **without
                )
            except (OSError, ValueError, SafetensorError) as error:
                reason = str(error).splitlines()[0]
                raise ValueError(
                    f"cannot load the text encoders of {self.directory}: {reason}"
                    + ("; pip install sentencepiece" if "tiktoken" in reason or "sentencepiece" in reason else "")
                ) from None
            return pipeline.to(self.device) if self.dtype is None else pipeline.to(self.device, self.dtype)

    @torch.no_grad()
    def _call(self, texts: list[str], negative: str | None = None) -> tuple[Row, Row]:
        """The pipeline's own ``encode_prompt``, with the settings of its own call: embeddings, and those of guidance.

        What guidance adds are the places of its answer that are None without; one that knows no guidance of two calls
        encodes the negative prompt like any.
        """
        known = inspect.signature(self.pipeline.encode_prompt).parameters
        call = inspect.signature(type(self.pipeline).__call__).parameters
        settings = {name: call[name].default for name in known if name in call}
        settings |= {name: None for name, p in known.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD}
        settings |= {"device": self.device, "num_images_per_prompt": 1}
        settings |= {} if self.length is None else {"max_sequence_length": self.length}
        two = "do_classifier_free_guidance"

        def encoded(**more: Any) -> tuple[Any, ...]:
            taken = {name: value for name, value in {**settings, **more}.items() if name in known}
            with _silent():
                return tuple(self.pipeline.encode_prompt(**taken))

        if negative is None or two not in known:
            return (row := _named(encoded(prompt=texts if negative is None else [negative], **{two: False}))), row
        one = encoded(prompt=texts, **{two: False})
        told = {"negative_prompt": [negative]} if negative else {}
        both = encoded(prompt=texts, **{two: True}, **told)
        return _named(one), _named([guiding for guiding, alone in zip(both, one, strict=True) if alone is None])

    def _path(self, texts: list[str]) -> Path:
        digest = hashlib.sha256(json.dumps([self.fingerprint, *texts]).encode())
        return _cache() / f"{digest.hexdigest()}.safetensors"

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One process encodes; the others wait, and find it done."""
        with (_cache() / f".{self.fingerprint[:16]}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _device(self) -> torch.device:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        size = sum(file.stat().st_size for file in self.files if file.suffix == ".safetensors")
        return torch.device("cuda" if 1.5 * size < torch.cuda.mem_get_info()[0] else "cpu")


def directory_of(location: str) -> Path:
    """A saved pipeline's directory; that of a Hub id holds its encoders, tokenizers and configurations."""
    if Path(location).is_dir():
        return Path(location)
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ValueError(
            f"{location} on the Hub needs huggingface_hub ({error}): pip install huggingface_hub"
        ) from None
    return Path(snapshot_download(location, allow_patterns=NEEDED, ignore_patterns=["*.fp16.*", "*.bf16.*"]))


def _named(answer: Sequence[Any]) -> Row:
    """The tensors of an answer by their shapes: text [B, L, E], mask [B, L] of whole numbers, pooled [B, P].

    The places of tokens in FLUX, [L, 3], are the network's own affair.
    """
    tensors = [value for value in answer if isinstance(value, Tensor)]
    text = next((value for value in tensors if value.ndim == 3), None)
    if text is None:
        raise ValueError(f"the pipeline encodes prompts as {[list(t.shape) for t in tensors]}, without [B, L, E]")
    row = {"text": text}
    for value in tensors:
        if value.ndim == 2 and not value.is_floating_point() and value.shape == text.shape[:2]:
            row["mask"] = value
        elif value.ndim == 2 and len(value) == len(text) and value.shape[1] > 3:
            row["pooled"] = value
    return {name: value.detach().cpu().contiguous() for name, value in row.items()}


def _has_words(tokenizer: Path) -> bool:
    """Whether the directory holds a vocabulary, in any of the forms of transformers."""
    held = {file.name for file in tokenizer.glob("*")}
    return (
        bool(held & {"tokenizer.json", "vocab.txt"})
        or {"vocab.json", "merges.txt"} <= held
        or any(name.endswith(".model") for name in held)
    )


def _cache() -> Path:
    """The directory of embeddings."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(os.environ.get("GAS_ENGINE_CACHE") or Path(home) / "gas_engine") / "prompts"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"embeddings of prompts cannot be kept in {path} ({error.strerror}); name a directory in GAS_ENGINE_CACHE"
        ) from None
    return path


def _write(path: Path, tensors: Row) -> None:
    with atomic(path) as temporary:
        save_file(tensors, temporary, {"format": FORMAT, "checksum": tensors_sha256(tensors)})


def _whole(path: Path) -> bool:
    """Whether a file is there as it was written; it is read once for that."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            return (file.metadata() or {}).get("checksum") == tensors_sha256(tensors)
    except (SafetensorError, OSError):
        return False


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without what diffusers and transformers log, and without their bars."""
    from diffusers.utils import logging as theirs
    from transformers.utils import logging as others

    shown = [log for log in (theirs, others) if log.is_progress_bar_enabled()]
    for log in shown:
        log.disable_progress_bar()
    try:
        with quiet():
            yield
    finally:
        for log in shown:
            log.enable_progress_bar()
