"""What a night has cost: workers that died, shards that took more than one of them. It goes into run.json."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Toll:
    """Told by the driver as it hears of it; the labels do not depend on any of this."""

    deaths: dict[str, int] = field(default_factory=dict)
    """Of each worker that has finished something: how often it was replaced."""
    careful: dict[int, int] = field(default_factory=dict)
    """Shards that were done with care, and how many workers had died over them before."""
    stalled: list[dict[str, Any]] = field(default_factory=list)
    """Shards that hung, where that was, and for how long."""

    def add(self, shard: int, deaths: int, worker: str, worker_deaths: int) -> None:
        """A shard was finished, after so many deaths over it, by a worker that was replaced so often."""
        if deaths:
            self.careful[shard] = deaths
        if worker_deaths:
            self.deaths[worker] = max(worker_deaths, self.deaths.get(worker, 0))

    @property
    def num_deaths(self) -> int:
        return sum(self.deaths.values())

    def describe(self) -> dict[str, Any]:
        return {
            "workers_replaced": self.num_deaths,
            "shards_done_with_care": {str(shard): deaths for shard, deaths in sorted(self.careful.items())},
            "shards_stalled": self.stalled,
        }
