"""Checks of which group averages a gradient: the tags of parameters, run by every rank of a group."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from parallel_cases import batch
from sync_checks import TOKENS, Model, Tagged, grads, loss_of, whole_and_part
from torch import nn
from torch.nn.utils import parametrize

from moeops.distributed import DistributedGroupedDataParallel
from processes import Ranks


def check_tags(ranks: Ranks) -> None:
    pairs = [dist.new_group([r, r + 1]) for r in range(0, ranks.size, 2)]
    pair = pairs[ranks.rank // 2]
    mean = (ranks.size + 1) / 2
    pair_mean = ranks.rank // 2 * 2 + 1.5
    tags = ("untagged", "dp", "gate", "moe", "world", "none", "mine", "other")
    expected = {
        **dict.fromkeys(("untagged", "dp", "gate", "world"), mean),
        **dict.fromkeys(("moe", "mine"), pair_mean),
        **dict.fromkeys(("none", "other"), ranks.rank + 1.0),
    }
    for auto in (False, True):
        model = Tagged(ranks.device, *tags)
        wrapped = DistributedGroupedDataParallel(
            model, auto, moe_group=pair, mine_group=pair, other_group=None
        )
        wrapped(list(tags), ranks.rank + 1.0).backward()
        if not auto:
            wrapped.allreduce_params()
        assert grads(model) == expected


def check_tags_set_later(ranks: Ranks) -> None:
    """What counts is the tag at the reduction; a change that nobody can follow is an error."""
    for auto in (False, True):
        model = Tagged(ranks.device, "a", "b")
        wrapped = DistributedGroupedDataParallel(model, auto, late_group=dist.group.WORLD)
        model.a.dp_comm = "none"
        model.b.dp_comm = "late"
        wrapped(["a", "b"], ranks.rank + 1.0).backward()
        if not auto:
            wrapped.allreduce_gradients()
        assert grads(model) == {"a": ranks.rank + 1.0, "b": (ranks.size + 1) / 2}
    loss = wrapped(["a", "b"], 1.0)
    model.a.dp_comm = "dp"
    with pytest.raises(RuntimeError, match="parameters and tags must be those of the last call"):
        loss.backward()


class LowRank(nn.Module):
    """What an adapter adds to a weight."""

    def __init__(self, weight: torch.Tensor, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        values = 0.1 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
        self.more = nn.Parameter(values.to(weight.device))

    def forward(self, weight):
        return weight + self.more


def assign(model: Model, seed: int) -> None:
    """Build on meta and assign, as for models that are too large for one process."""
    model.load_state_dict(
        {n: p.detach().clone() for n, p in model.state_dict().items()}, True, True
    )


def swap(model: Model, seed: int) -> None:
    for parameter in model.parameters():
        other = nn.Parameter(parameter.detach().clone())
        torch.utils.swap_tensors(parameter, other)


def adapt(model: Model, seed: int) -> None:
    for name in ("w_up", "w_down"):
        part = LowRank(getattr(model.moe.experts, name), seed)
        parametrize.register_parametrization(model.moe.experts, name, part)


def check_parameters_made_anew(ranks: Ranks) -> None:
    """The tags are the layer's: whatever made an expert's parameters, no other rank's are put in their place."""
    x = batch(TOKENS * ranks.size, ranks.device)
    mine = x.split(TOKENS)[ranks.rank]
    for change in (assign, swap, adapt):
        for auto in (False, True):
            results = []
            for later in (False, True):
                _, part = whole_and_part(ranks, ranks.size, ranks.rank)
                if not later:
                    change(part, ranks.rank)
                before = [p.detach().clone() for p in part.moe.experts.parameters()]
                wrapped = DistributedGroupedDataParallel(part, auto)
                if later:
                    change(part, ranks.rank)
                else:
                    after = list(part.moe.experts.parameters())
                    assert all(map(torch.equal, before, after)), change.__name__
                loss_of(wrapped(mine)).backward()
                if not auto:
                    wrapped.allreduce_gradients()
                results.append({n: p.grad for n, p in part.named_parameters()})
            torch.testing.assert_close(results[0], results[1])
    assign(part, 0)
    loss_of(part(mine)).backward()
    with pytest.raises(RuntimeError, match="parameters and tags must be those of the last call"):
        wrapped.allreduce_gradients()
