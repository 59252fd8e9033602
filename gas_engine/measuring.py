"""Measurements of solvers, by parts that stay on the disk under a checksum of all that they depend on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from .candidates import Candidate
from .conditioning import moved
from .denoiser import Denoiser, seeded
from .distributed import Group
from .files import atomic, tensors_sha256
from .metrics.meter import Measured, Meter, joined
from .metrics.reference import BATCH, Reference
from .rollout import rollout
from .teacher import TeacherSolver, load_index

PART = 1024  # samples of a file
VERSION = 1  # of what is measured of a sample: another one makes old files of no use


@dataclass(frozen=True)
class Measuring:
    """Everything that measuring takes; what was measured of 1,024 samples is a file under ``out``/measured."""

    denoiser: Denoiser
    seeds: list[int]
    meter: Meter
    teacher: TeacherSolver
    out: Path
    batch: int
    device: torch.device
    group: Group

    def key(self, *what: object) -> str:
        """A checksum of what a measurement depends on."""
        decoder = self.denoiser.decoder
        weights = decoder.state_dict() if isinstance(decoder, nn.Module) else {}
        facts = [self.denoiser.fingerprint(), self.denoiser.facts(), asdict(self.teacher), self._meter_key]
        return tensors_sha256(weights, [*facts, self.meter.perceptual is not None, *what])[:32]

    @property
    def _meter_key(self) -> list[object]:
        extractor = self.meter.extractor
        return [VERSION, extractor and extractor.identity, self.meter.spatial]

    def kept(self, key: str, make: Callable[[], Measured]) -> Measured:
        """What the file of this name holds; made and written where there is none."""
        path = self.out / "measured" / f"{key}.safetensors"
        if not self.group.first(lambda: _whole(path)):
            made = make()
            if self.group.main:
                with atomic(path) as temporary:
                    save_file({name: value.contiguous() for name, value in made.items()}, temporary)
            self.group.barrier()
        return load_file(path)

    def measured(self, candidate: Candidate | None, advance: Callable[[int], None]) -> Measured:
        """Of a solver's samples on all seeds, or of the teacher's."""
        said = "teacher" if candidate is None else candidate.checksum
        parts = []
        for start in range(0, len(self.seeds), PART):
            seeds = self.seeds[start : start + PART]
            parts.append(self.kept(self.key(said, seeds), lambda seeds=seeds: self._part(candidate, seeds, advance)))  # type: ignore[misc]
        return joined(parts)

    @torch.no_grad()
    def _part(self, candidate: Candidate | None, seeds: list[int], advance: Callable[[int], None]) -> Measured:
        def measure(start: int) -> Measured:
            few = seeds[start : start + self.batch]
            teacher = self.teachers(few)
            states = teacher
            if candidate is not None:
                noise, cond = moved(seeded(self.denoiser, few), self.device)
                states = rollout(self.denoiser, noise, candidate.tableau, cond)
            found = self.meter.samples(self.denoiser, states.cpu(), teacher, self.device)
            advance(len(few))
            return found

        return joined(self.group.map(measure, range(0, len(seeds), self.batch)))

    def teachers(self, seeds: Sequence[int]) -> torch.Tensor:
        """The teacher's samples of these seeds, from the set on the disk."""
        wanted, found = {*seeds}, dict[int, torch.Tensor]()
        for entry in load_index(self.out / "teacher"):
            rows = [row for row, seed in enumerate(entry["seeds"]) if seed in wanted]
            if rows:
                with safe_open(self.out / "teacher" / entry["file"], framework="pt") as file:
                    part = file.get_slice("samples")[rows[0] : rows[-1] + 1]
                found |= {entry["seeds"][row]: part[row - rows[0]] for row in rows}
        return torch.stack([found[seed] for seed in seeds])

    def data(self, reference: Reference, advance: Callable[[int], None]) -> Measured | None:
        """Of the reference's images, where it has any."""
        if reference.read is None:
            return None
        read = reference.read

        def measure(start: int) -> Measured:
            images = read(start)
            advance(len(images))
            return self.meter.pictures(images)

        key = tensors_sha256({}, [reference.identity, self.denoiser.shape, *self._meter_key])[:32]
        return self.kept(key, lambda: joined(self.group.map(measure, range(0, reference.count, BATCH))))


def _whole(path: Path) -> bool:
    """Whether a file was written to its end."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False
