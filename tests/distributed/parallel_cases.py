"""Expert-parallel layers, the one-rank layer that they must equal, and routings that try them.

The first column of a token is its index in the whole batch; ``TableGate`` chooses by it, so that a routing is the same
however the batch is cut.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from moeops import FMoE, FMoETransformerMLP
from moeops.dispatch.options import DISPATCHES
from moeops.gates import BaseGate
from processes import Ranks

D, H, K = 6, 5, 2


def even(index: Tensor, num_experts: int) -> Tensor:
    return torch.stack([index % num_experts, (index + 1) % num_experts], 1)


def uneven(index: Tensor, num_experts: int) -> Tensor:
    first = (index * index) % num_experts
    return torch.stack([first, (first + 1 + index % 2) % num_experts], 1)


def all_to_one(index: Tensor, num_experts: int) -> Tensor:
    last = torch.full_like(index, num_experts - 1)
    return torch.stack([last, torch.full_like(index, -1)], 1)


def dropped(index: Tensor, num_experts: int) -> Tensor:
    keep = torch.stack([index % 3 != 0, index % 2 == 0], 1)
    return torch.where(keep, even(index, num_experts), -1)


def nothing(index: Tensor, num_experts: int) -> Tensor:
    return torch.full((index.shape[0], K), -1, device=index.device)


ROUTINGS = (even, uneven, all_to_one, dropped, nothing)


class TableGate(BaseGate):
    """Choose by the token's index; the weights depend on the token, so that the gate learns."""

    def __init__(self, d_model, num_expert, world_size=1, top_k=K):
        super().__init__(num_expert, world_size)
        self.top_k = top_k
        self.gate = nn.Linear(d_model, self.tot_expert)
        # A buffer, so that one graph serves all routings.
        self.register_buffer("table", even(torch.arange(99), self.tot_expert), persistent=False)

    def set_routing(self, routing):
        index = torch.arange(99, device=self.table.device)
        self.table.copy_(routing(index, self.tot_expert))

    def forward(self, x):
        ids = self.table[x[:, 0].round().long()]
        scores = F.softmax(self.gate(x), -1).gather(1, ids.clamp(min=0))
        return ids, scores


class Nested(nn.Module):
    """An expert with a nest of inputs and outputs, one of which is no float."""

    def __init__(self, d_model):
        super().__init__()
        self.up = nn.Linear(d_model, H)
        self.down = nn.Linear(H, 4)

    def forward(self, rows):
        hidden = torch.tanh(self.up(rows["x"])) * rows["scale"].to(rows["x"].dtype)
        return {"y": self.down(hidden), "z": hidden.unflatten(1, (1, H))}


def in_place(d_model: int) -> nn.Module:
    """An expert that writes into its rows first."""
    return nn.Sequential(nn.LeakyReLU(0.5, inplace=True), nn.Linear(d_model, 3))


SHARED_OPTIONS = (
    "gate",
    "top_k",
    "dtype",
    "mask_dict",
    "expert",
    "shared_expert",
    "shared_expert_gate",
)
KINDS = ("mlp", "composed", "modules", "nested")


def with_record(options: dict) -> dict:
    """Arguments of a layer from a case's options, which are flat so that cases combine: a dispatcher's in a record."""
    names = (
        "capacity",
        "n_chunks",
        "hierarchy",
        "shadowing",
        "replicas",
        "rows",
        "max_tokens",
        "transport",
    )
    own = {name: options[name] for name in names if name in options}
    if not own:
        return options
    rest = {name: value for name, value in options.items() if name not in own}
    record = DISPATCHES[rest.get("dispatch", "exact")](**own)
    return {**rest, "dispatch": record}


def make(kind: str, num_expert: int, device: str, dtype=torch.float64, **options) -> FMoE:
    options = {"top_k": K, "gate": TableGate, "dtype": dtype, "device": device, **options}
    options = with_record(options)
    if kind == "mlp":
        return FMoETransformerMLP(num_expert, D, H, activation="swiglu", **options)
    if kind == "composed":
        return FMoETransformerMLP(num_expert, D, H, activation=torch.tanh, **options)
    expert = Nested if kind == "nested" else in_place
    return FMoE(num_expert, D, **{"expert": expert, **options})


def make_pair(kind: str, ranks: Ranks, num_expert: int = 2, **options) -> tuple[FMoE, FMoE]:
    """This rank's part of a layer, and the whole layer on one rank, with the same parameters."""
    torch.manual_seed(1)
    shared = {n: options[n] for n in SHARED_OPTIONS if n in options}
    whole = make(kind, num_expert * ranks.size, ranks.device, **shared)
    part = make(kind, num_expert, ranks.device, world_size=ranks.size, **options)
    copy_share(whole, part, ranks.rank)
    return part, whole


def share(whole: FMoE, rank: int, num_expert: int, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """What of the whole layer's tensors belongs to a rank, under the names that they have there."""
    first, result = rank * num_expert, {}
    for name, value in values.items():
        if name.startswith("experts.") and whole.experts_fused is False and "w_" not in name:
            index, rest = name.removeprefix("experts.").split(".", 1)
            if index.isdigit():
                if first <= int(index) < first + num_expert:
                    result[f"experts.{int(index) - first}.{rest}"] = value
                continue
        result[name] = value
        if name.startswith("experts."):
            result[name] = value[first : first + num_expert]
    return result


def copy_share(whole: FMoE, part: FMoE, rank: int) -> None:
    part.load_state_dict(share(whole, rank, part.num_expert, whole.state_dict()))


def batch(num_tokens: int, device: str, dtype=torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, D, generator=generator, dtype=torch.float64)
    x[:, 0] = torch.arange(num_tokens)
    return x.to(device, dtype)


def token_counts(size: int) -> dict[str, list[int]]:
    """How a batch is cut: tokens of each rank."""
    return {
        "equal": [6] * size,
        "unequal": [3 + 2 * rank for rank in range(size)],
        "one_rank_without": [0] + [5] * (size - 1),
        "none": [0] * size,
    }


def as_input(kind: str, x: Tensor):
    if kind != "nested":
        return x
    scale = torch.ones(len(x), 1, dtype=torch.int16, device=x.device)
    return {"x": x, "scale": scale.add_(x[:, 1:2] > 0)}


def loss_of(y) -> Tensor:
    leaves = list(y.values()) if isinstance(y, dict) else [y]
    return sum((leaf * leaf).sum() + leaf.sum() for leaf in leaves)


def step(layer, gate_layer: FMoE, kind: str, x: Tensor, routing) -> dict[str, Tensor]:
    """Forward and backward: output and gradients by name."""
    if routing is not None:
        gate_layer.gate.set_routing(routing)
    gate_layer.zero_grad(set_to_none=True)
    x = x.detach().clone().requires_grad_()
    y = layer(as_input(kind, x))
    loss_of(y).backward()
    results = {"y": y, "x": x.grad}
    if isinstance(y, dict):
        results = {**y, "x": x.grad}
    results = {name: value.detach() for name, value in results.items()}
    for name, parameter in gate_layer.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        results[name] = parameter.grad
    return results


def assert_equals_whole(
    layer, part: FMoE, whole: FMoE, kind: str, ranks: Ranks, counts, routing, tolerance=1e-10
) -> None:
    """One step on the parts of a batch against the same step of the whole layer on all of it."""
    x = batch(sum(counts), ranks.device, next(part.parameters()).dtype)
    mine = x.split(counts)[ranks.rank]
    actual = step(layer, part, kind, mine, routing)
    expected = step(whole, whole, kind, x, routing)
    num_outputs = len(expected) - len(list(whole.named_parameters()))
    names = list(expected)
    wanted = {name: expected[name].split(counts)[ranks.rank] for name in names[:num_outputs]}
    gradients = {name: expected[name] for name in names[num_outputs:]}
    wanted.update(share(whole, ranks.rank, part.num_expert, gradients))
    assert actual.keys() == wanted.keys()
    for name, value in wanted.items():
        if name.startswith(("gate.", "shared_expert")):
            dist.all_reduce(actual[name])
        torch.testing.assert_close(
            actual[name],
            value,
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, name=name: f"{kind} {routing.__name__} {counts} {name}: {text}",
        )
