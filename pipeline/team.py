"""The workers of a training job, as one of them sees the others: who is on its host, and what all agree on.

What is agreed on goes through CPU memory, on every kind of worker: it is small, and a GPU need not wait for it.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class Team:
    """All workers of the job; one alone where torch.distributed was not started."""

    def __init__(self, host: str = "") -> None:
        """`host` tells the machines apart, for a worker shares what it decodes with the others on its own."""
        self.size = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if self.size > 1 else 0
        self._group: Any = dist.new_group(backend="gloo") if self.size > 1 and dist.get_backend() != "gloo" else None
        hosts = self.gather(host)
        self.local_ranks = [rank for rank, other in enumerate(hosts) if other == host]
        """The workers on this host, by rank; the first of them leads."""

    @property
    def is_lead(self) -> bool:
        return self.rank == 0

    @property
    def local_size(self) -> int:
        return len(self.local_ranks)

    @property
    def local_rank(self) -> int:
        return self.local_ranks.index(self.rank)

    def gather(self, value: T) -> list[T]:
        """What each worker has, by rank."""
        if self.size == 1:
            return [value]
        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def share(self, value: T) -> T:
        """What the lead has."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]

    def share_numbers(self, numbers: Tensor) -> Tensor:
        """What the lead has, a tensor on the CPU: quicker than `share`, for what is shared with the steps."""
        if self.size > 1:
            dist.broadcast(numbers, src=0, group=self._group)
        return numbers

    def sum(self, numbers: Tensor) -> Tensor:
        """The sum over all workers, in place, on the workers' device."""
        if self.size > 1:
            dist.all_reduce(numbers)
        return numbers

    def copy_from_lead(self, tensors: list[Tensor]) -> None:
        """Give each worker the lead's values, in place, on the workers' device."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def meet(self) -> None:
        """Wait until all are here."""
        if self.size > 1:
            dist.all_reduce(torch.zeros(1), group=self._group)
