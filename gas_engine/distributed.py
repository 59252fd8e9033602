"""`Group`: the processes that work on one thing, and the little that they have to tell each other.

Data are parallel over seeds: a process samples its part of a batch, and what it has to say is the gradient of a few
hundred numbers. The network is frozen and needs no word, unless its weights are spread over the processes
(``memory.shard_weights``).

| | says | how |
|---|---|---|
| solver | its gradient and the loss | `mean_`: one all-reduce of float64 on the host |
| any part of an update | whether memory ran out | `any` |
| discriminator | its gradients | `mean_gradients_`: buckets, where they are |
| teacher, evaluation | samples, distances | `map`: whole batches, one process each |
| directory, resuming | what rank 0 found | `first` |

    torchrun --nproc-per-node 4 -m gas_engine.train --model ffhq.safetensors
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ._cli import InputError, console, pick_device
from .files import tensors_sha256

__all__ = ["ALONE", "Group", "RankLost", "RanksDiffer"]

Item = TypeVar("Item")
Result = TypeVar("Result")


class RankLost(ConnectionError):
    """Raised when another process ended, or did not answer in time."""


class RanksDiffer(ValueError):
    """Raised when what must be the same on all ranks is not."""


@dataclass(frozen=True)
class Group:
    """Rank ``rank`` of ``size`` processes, number ``local_rank`` on its machine; one process is its own group.

    Every rank calls the same methods in the same order. For one process all of them are identities and torch's process
    groups are not touched. ``lockstep``: a network call needs all ranks (its weights are spread over them), so all make
    equally many.

        with Group.from_environment() as group:
            mine = rows[group.part(len(rows))]
            ...
            loss = group.mean_(solver.parameters(), loss, len(mine) / len(rows))
            optimizer.step()
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    lockstep: bool = False

    @classmethod
    def from_environment(cls) -> Group:
        """The group that torchrun's variables RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT tell of, or one
        process alone without them.

        Tensors on the host go through gloo, those on a GPU through NCCL. A process that dies closes its connections,
        which the others notice at the next thing they have to say; one that is silent for GAS_ENGINE_TIMEOUT seconds
        (600 unless set: a slow rank may still be sampling) counts as lost as well. Ranks other than 0 print nothing but
        what stops them. Raises InputError for variables that are missing or no numbers.
        """
        if "WORLD_SIZE" not in os.environ:
            return cls()
        rank, size = _number("RANK"), _number("WORLD_SIZE")
        group = cls(rank, size, _number("LOCAL_RANK", str(rank)))
        if size > 1:
            seconds = _number("GAS_ENGINE_TIMEOUT", "600")
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            try:
                dist.init_process_group(backend, rank=rank, world_size=size, timeout=timedelta(seconds=seconds))
            except RuntimeError as error:
                raise group._alone(error) from None
        console.quiet = not group.main
        return group

    @property
    def main(self) -> bool:
        """Whether this is the rank that writes and prints."""
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """The device of this rank: "auto" and "cuda" are the card of its local rank. InputError where there is none."""
        if self.size == 1 or name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
            return pick_device(name)
        if name not in ("auto", "cuda"):
            raise InputError(f"--device {name} would be the same for {self.size} processes; give --device cuda or cpu")
        cards = torch.cuda.device_count()
        if self.local_rank >= cards:
            raise InputError(f"process {self.local_rank} of this machine has no GPU of its own: there are {cards}")
        device = torch.device("cuda", self.local_rank)
        torch.cuda.set_device(device)
        return device

    # What a rank has to do

    def part(self, count: int) -> slice:
        """This rank's part of ``count`` rows: consecutive, of sizes that differ by one at most, maybe empty."""
        if self.lockstep and count % self.size:
            raise InputError(
                f"--shard needs a batch that {self.size} processes can divide evenly, got {count}; "
                f"give --batch {-(-count // self.size) * self.size}"
            )
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def most(self, count: int) -> int:
        """The rows of the rank that has the most."""
        return -(-count // self.size)

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """``[function(item) for item in items]`` on all ranks, every item done by one of them.

        In lockstep a rank with no item left does the first once more, for the network calls of the others.
        """
        if self.size == 1:
            return [function(item) for item in items]
        mine = [function(item) for item in items[self.rank :: self.size]]
        if self.lockstep and 0 < len(items) % self.size <= self.rank:
            function(items[0])
        results = self.gather(mine)
        return [results[i % self.size][i // self.size] for i in range(len(items))]

    def first(self, function: Callable[[], Result]) -> Result:
        """What ``function()`` returns on rank 0, on all ranks. Where it raises there, all stop."""
        if self.size == 1:
            return function()
        said: list[Any] = [None, False]
        if self.main:
            try:
                said = [function(), True]
            except BaseException:
                dist.broadcast_object_list(said)
                raise
        dist.broadcast_object_list(said)
        if not said[1]:
            raise SystemExit(2)  # rank 0 says why
        return said[0]

    # What ranks tell each other

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors by their sums over the ranks, by one all-reduce of float64 on the host; for few numbers."""
        if self.size == 1:
            return
        tensors = [t.detach() for t in tensors]
        flat = torch.cat([t.flatten().to("cpu", torch.float64) for t in tensors])
        dist.all_reduce(flat)
        for t, values in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            t.copy_(values.view_as(t))

    def mean_(self, parameters: Iterable[nn.Parameter], loss: Tensor, share: float) -> Tensor:
        """The mean loss over a batch, from that over this rank's ``share`` of it, and the parameters' gradients
        likewise, in place.

        One ``sum_``: a float64 of 8 bytes for every number. A gradient that is not finite on one rank is so on all.
        """
        if self.size == 1:
            return loss
        parameters = [*parameters]
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad.mul_(share)
        total = loss.detach().cpu().double() * share
        self.sum_([total, *(p.grad for p in parameters if p.grad is not None)])
        return total

    def mean_gradients_(self, module: nn.Module, weight: float, bucket_bytes: int = 25 * 2**20) -> None:
        """Replace the ``.grad`` of trainable parameters by ``sum over ranks of weight * grad``.

        ``weight`` is the rank's share of the batch, so that the result is the gradient of the mean over all of it; a
        rank with no rows has weight 0 and may have no gradients. Reduced in buckets, in the order of the parameters and
        their dtype; memory: one bucket. Not ``DistributedDataParallel``: that reduces in hooks of autograd's, once per
        backward pass, and the penalties on a discriminator add to ``.grad`` by hand, from several passes.

            group.mean_gradients_(discriminator, len(mine) / len(batch))
        """
        if self.size == 1:
            return
        bucket: list[Tensor] = []

        def reduce() -> None:
            flat = torch.cat([g.flatten() for g in bucket]).mul_(weight)
            dist.all_reduce(flat)
            for g, values in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                g.copy_(values.view_as(g))
            bucket.clear()

        for p in module.parameters():
            if not p.requires_grad:
                continue
            if p.grad is None or weight == 0:
                p.grad = torch.zeros_like(p)
            if bucket and (
                (bucket[0].dtype, bucket[0].device) != (p.dtype, p.device)
                or sum(g.nbytes for g in bucket) + p.nbytes > bucket_bytes
            ):
                reduce()
            bucket.append(p.grad)
        if bucket:
            reduce()

    def broadcast_(self, module: nn.Module) -> None:
        """Give all ranks the parameters and buffers of rank 0."""
        if self.size > 1:
            for value in (*module.parameters(), *module.buffers()):
                dist.broadcast(value.detach(), 0)

    def gather(self, value: Result) -> list[Result]:
        """The value of every rank, in their order; tensors should be on the host."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def any(self, said: bool) -> bool:
        """Whether any rank says so."""
        if self.size == 1:
            return said
        flag = torch.tensor(float(said))
        self.sum_([flag])
        return bool(flag > 0)

    def check_same(self, tensors: Mapping[str, Tensor], when: str) -> None:
        """Raises RanksDiffer unless the tensors have the same bits on all ranks."""
        if self.size == 1:
            return
        sums = self.gather(tensors_sha256(tensors))
        if len({*sums}) > 1:
            strangers = [rank for rank, value in enumerate(sums) if value != sums[0]]
            raise RanksDiffer(
                f"{when}: rank(s) {', '.join(map(str, strangers))} hold other numbers than rank 0, so the processes no "
                "longer train one solver; the last checkpoint is whole: go on with --resume, and check the machine"
            )

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.any(False)

    # Leaving

    def __enter__(self) -> Group:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Leave the group; a lost connection becomes ``RankLost``."""
        if self.size > 1 and error is not None and _lost(error):
            raise self._alone(error) from error
        if self.size > 1:
            dist.destroy_process_group()

    def _alone(self, error: BaseException) -> RankLost:
        # "[where in the library] what happened. What that is typically caused by. ..."
        reason = str(error).strip().partition("\n")[0].rpartition("] ")[2].partition(". ")[0]
        return RankLost(
            f"rank {self.rank} of {self.size} stops, since another process ended or does not answer ({reason}); what "
            "was written is whole: start all processes again, a training run with --resume"
        )


ALONE = Group()


def _lost(error: BaseException) -> bool:
    """Whether an error came from the connections to other processes."""
    if isinstance(error, dist.DistError):
        return True
    words = ("gloo/", "nccl", "connection closed by peer", "connection reset by peer", "timed out waiting")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


def _number(name: str, default: str | None = None) -> int:
    value = os.environ.get(name, default)
    try:
        number = int(value)  # type: ignore[arg-type]  # None is refused as well
    except (TypeError, ValueError):
        raise InputError(f"{name} must be a number, as torchrun sets it, got {value!r}") from None
    if number < 0:
        raise InputError(f"{name} must be a number from 0, as torchrun sets it, got {value!r}")
    return number
