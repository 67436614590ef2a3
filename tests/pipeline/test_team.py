"""One worker alone is a team, too; what several do together is seen in `test_train`."""

from __future__ import annotations

import torch

from pipeline.team import Team


def test_worker_alone_agrees_with_itself():
    team = Team("host")
    assert (team.size, team.rank, team.local_size, team.local_rank, team.is_lead) == (1, 0, 1, 0, True)
    assert team.gather("mine") == ["mine"]
    assert team.share({"mine": 1}) == {"mine": 1}
    numbers = torch.tensor([1, 2])
    assert team.share_numbers(numbers) is numbers and team.sum(numbers) is numbers
    team.copy_from_lead([numbers])
    team.meet()
    assert numbers.tolist() == [1, 2]
