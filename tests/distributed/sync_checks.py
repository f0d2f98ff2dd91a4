"""Checks of gradients that are averaged over different groups, run by every rank of a group."""

from __future__ import annotations

import contextlib
import copy
import math

import pytest
import torch
import torch.distributed as dist
from parallel_cases import D, batch, make, share
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.nn.parallel import DistributedDataParallel

from moeops import (
    FMoETransformerMLP,
    RoutingReplay,
    auxiliary_loss,
    inject_auxiliary_loss,
    sort_tokens,
)
from moeops.distributed import (
    DistributedGroupedDataParallel,
    clip_grad_norm_,
    scale_expert_gradients,
)
from moeops.gates import NaiveGate, with_losses
from processes import Ranks

TOKENS, STEPS = 4, 3  # tokens of each rank
PREFIX = "moe."


class Model(nn.Module):
    """A layer between two others; the router sees the tokens' indices, so that routings vary."""

    def __init__(self, num_expert: int, device: str, dtype=torch.float64, **options):
        super().__init__()
        torch.manual_seed(4)
        self.first = nn.Linear(D, D, dtype=dtype, device=device)
        self.moe = make("mlp", num_expert, device, dtype, **options)
        self.last = nn.Linear(D, 2, dtype=dtype, device=device)

    def forward(self, x):
        tokens = torch.cat((x[:, :1], self.first(x)[:, 1:]), 1)
        return self.last(tokens + self.moe(tokens))


class Tagged(nn.Module):
    """A parameter for each tag, all of them ones."""

    def __init__(self, device: str, *tags: str):
        super().__init__()
        for tag in tags:
            parameter = nn.Parameter(torch.ones(3, device=device))
            if tag != "untagged":
                parameter.dp_comm = tag
            self.register_parameter(tag, parameter)

    def forward(self, used: list[str], factor: float):
        return sum((getattr(self, name) * factor).sum() for name in used)


def grads(model: Tagged) -> dict[str, float | None]:
    return {
        n: None if p.grad is None else p.grad.unique().item() for n, p in model.named_parameters()
    }


def whole_and_part(ranks: Ranks, size: int, place: int, **options) -> tuple[Model, Model]:
    """The model on one rank, and this rank's part, which is ``place`` among the ``size`` that hold the experts."""
    whole = Model(2 * size, ranks.device)
    part = Model(2, ranks.device, world_size=size, **options)
    part.load_state_dict(own_share(whole.state_dict(), whole, place))
    return whole, part


def own_share(values, whole: Model, place: int):
    moe = {n.removeprefix(PREFIX): v for n, v in values.items() if n.startswith(PREFIX)}
    rest = {n: v for n, v in values.items() if not n.startswith(PREFIX)}
    return rest | {PREFIX + n: v for n, v in share(whole.moe, place, 2, moe).items()}


def loss_of(y):
    return (y - 0.3).square().mean()


def train(model, rest, x, *, after=None, max_norm=0.05, clip=clip_grad_norm_):
    """Train on one batch; ``rest`` is the module that holds the parameters."""
    optimizer = torch.optim.SGD(rest.parameters(), lr=0.3, momentum=0.9)
    norms = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model(x + 0.1 * step)).backward()
        if after is not None:
            after()
        norms.append(clip(rest, max_norm))
        optimizer.step()
    return torch.stack(norms)


def assert_trains_like_one_rank(ranks: Ranks, wrap, part: Model, whole: Model, place: int) -> None:
    x = batch(TOKENS * ranks.size, ranks.device)
    norms = train(whole, whole, x)
    model, after = wrap(part)
    actual = train(model, part, x.split(TOKENS)[ranks.rank], after=after)
    assert norms.min() > 0.05  # so that clipping did something
    torch.testing.assert_close(actual, norms)
    wanted = own_share(dict(whole.named_parameters()), whole, place)
    for name, parameter in part.named_parameters():
        torch.testing.assert_close(
            parameter, wanted[name], msg=lambda text, name=name: f"{name}: {text}"
        )


def explicit(model: nn.Module, **options):
    wrapped = DistributedGroupedDataParallel(model, **options)
    return wrapped, wrapped.allreduce_gradients


def automatic(model: nn.Module, **options):
    return DistributedGroupedDataParallel(model, auto_allreduce=True, **options), None


def compiled(model: nn.Module):
    graph = torch.compile(model, fullgraph=True, backend="aot_eager")
    # The wrapper need not be called: its hooks are on the parameters.
    graph.wrapper = DistributedGroupedDataParallel(model, auto_allreduce=True)
    return graph, None


def check_trains_like_one_rank(ranks: Ranks) -> None:
    wraps = [explicit, lambda model: automatic(model, bucket_bytes=200)]
    if ranks.size == 2:
        wraps += [automatic, compiled]
    for wrap in wraps:
        for options in ({"n_chunks": 2}, {"dispatch": "static", "capacity": 9}):
            whole, part = whole_and_part(ranks, ranks.size, ranks.rank, **options)
            assert_trains_like_one_rank(ranks, wrap, part, whole, ranks.rank)


def check_replicas_of_experts(ranks: Ranks) -> None:
    """Experts over one dimension of a mesh, copies of them over the other: the tag "moe"."""
    half = ranks.size // 2
    kind = ranks.device.partition(":")[0]
    mesh = init_device_mesh(kind, (2, half), mesh_dim_names=("data", "experts"))
    place = ranks.rank % half
    for wrap in (explicit, automatic):
        group = mesh.get_group("experts") if half > 1 else None
        whole, part = whole_and_part(ranks, half, place, moe_group=group)
        part.moe.mark_parallel_comm("moe")
        assert_trains_like_one_rank(
            ranks,
            lambda m, w=wrap: w(m, moe_group=mesh.get_group("data")),
            part,
            whole,
            place,
        )


def check_distributed_data_parallel(ranks: Ranks) -> None:
    """torch's own DDP for all but the experts."""

    def wrap(model):
        scale_expert_gradients(model)
        names = [n for n, _ in model.named_parameters() if ".experts." in n]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
        return DistributedDataParallel(model), None

    whole, part = whole_and_part(ranks, ranks.size, ranks.rank)
    assert_trains_like_one_rank(ranks, wrap, part, whole, ranks.rank)


def check_fully_sharded(ranks: Ranks) -> None:
    """FSDP2 over all ranks, one unit per linear layer, and over their copies for the experts."""
    half = ranks.size // 2
    kind = ranks.device.partition(":")[0]
    mesh = init_device_mesh(kind, (2, half), mesh_dim_names=("data", "experts"))
    place = ranks.rank % half
    group = mesh.get_group("experts") if half > 1 else None
    whole, part = whole_and_part(ranks, half, place, moe_group=group)
    wanted = own_share(dict(whole.named_parameters()), whole, place)
    fully_shard(part.moe.experts, mesh=mesh["data"])
    for module in part.modules():
        if isinstance(module, nn.Linear):
            fully_shard(module, mesh=everyone(ranks))
    fully_shard(part, mesh=everyone(ranks))
    scale_expert_gradients(part)
    x = batch(TOKENS * ranks.size, ranks.device)
    norms = train(whole, whole, x)
    actual = train(part, part, x.split(TOKENS)[ranks.rank])
    torch.testing.assert_close(actual, norms)
    for name, parameter in part.named_parameters():
        torch.testing.assert_close(parameter.full_tensor(), wanted[name])


def everyone(ranks: Ranks) -> DeviceMesh:
    """A mesh of all ranks on their own kind of device, where FSDP2 would take a GPU that is there."""
    return init_device_mesh(ranks.device.partition(":")[0], (ranks.size,))


def check_mixed_precision_rounds_no_routing_weights(ranks: Ranks) -> None:
    """FSDP casts what a unit is called with; experts in bfloat16 still get the gate's float32 weights."""
    torch.manual_seed(0)
    layer = FMoETransformerMLP(4, D, 12, activation="swiglu").to(ranks.device)
    whole = copy.deepcopy(layer)
    x = torch.randn(32, D, device=ranks.device).bfloat16()
    ids, weights = whole.gate(x)
    half = copy.deepcopy(whole.experts).bfloat16()
    expected = half(x, weights, sort_tokens(ids, 4))
    expected.square().sum().backward()
    assert not torch.equal(expected, half(x, weights.bfloat16(), sort_tokens(ids, 4)))

    mesh = everyone(ranks)

    def of_experts(layer):
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        fully_shard(layer.experts, mp_policy=policy, mesh=mesh)
        fully_shard(layer, mesh=mesh)

    def of_wrapped_experts(layer):
        layer.experts = checkpoint_wrapper(layer.experts)
        of_experts(layer)

    def first_version(layer):
        policy = MixedPrecision(param_dtype=torch.bfloat16)
        device = torch.device(ranks.device)
        layer.experts = FullyShardedDataParallel(
            layer.experts, mixed_precision=policy, device_id=device, use_orig_params=True
        )

    shards = [of_experts, of_wrapped_experts]
    if ranks.device != "cpu":  # on which torch's first version does not work
        shards.append(first_version)
    for shard in shards:
        part = copy.deepcopy(layer)
        shard(part)
        y = part(x)
        assert torch.equal(y, expected), shard.__name__
        y.square().sum().backward()
        gradient = part.gate.gate.weight.grad
        gradient = gradient.full_tensor() if shard is not first_version else gradient
        torch.testing.assert_close(gradient, whole.gate.gate.weight.grad)


def check_replay_weighs_by_a_sharded_gate(ranks: Ranks) -> None:
    """FSDP2 gathers the router's weights for the forward, and for the weights of recorded experts."""
    torch.manual_seed(0)
    whole = FMoETransformerMLP(4, D, 12, activation="swiglu").to(ranks.device)
    x = torch.randn(32, D, device=ranks.device)
    expected = whole(x)
    for unit in ("gate", "gate.gate"):
        part = copy.deepcopy(whole)
        fully_shard(part.get_submodule(unit), mesh=everyone(ranks))
        fully_shard(part, mesh=everyone(ranks))
        replay = RoutingReplay(part)
        replay.record()
        part(x)
        decisions = replay.take()
        for _ in range(2):
            replay.replay(decisions, weights="gate")
            torch.testing.assert_close(part(x), expected)


def check_experts_sharded_with_the_rest(ranks: Ranks) -> None:
    _, part = whole_and_part(ranks, ranks.size, ranks.rank)
    fully_shard(part, mesh=everyone(ranks))
    with pytest.raises(ValueError, match="experts must be sharded by themselves, got w_up"):
        scale_expert_gradients(part)


def check_experts_that_are_modules(ranks: Ranks) -> None:
    """They are spread over ranks without a tag too."""
    torch.manual_seed(ranks.rank)
    layer = make("modules", 2, ranks.device, world_size=ranks.size)
    own = [p.detach().clone() for p in layer.experts.parameters()]
    DistributedGroupedDataParallel(layer)
    assert all(map(torch.equal, own, layer.experts.parameters()))
    gate = [p.detach().clone() for p in layer.gate.parameters()]
    for p in gate:
        dist.broadcast(p, 0)
    assert all(map(torch.equal, gate, layer.gate.parameters()))


def check_ranks_that_use_different_parameters(ranks: Ranks) -> None:
    for auto in (False, True):
        model = Tagged(ranks.device, "a", "b", "c")
        wrapped = DistributedGroupedDataParallel(
            model, auto, bucket_bytes=12, a_group=dist.group.WORLD, b_group=dist.group.WORLD
        )
        for _ in range(2):
            model.zero_grad()
            wrapped(["a", "b"] if ranks.rank == 0 else ["a"], 2.0).backward()
            if not auto:
                wrapped.allreduce_gradients()
            assert grads(model) == {"a": 2.0, "b": 2.0 / ranks.size, "c": None}


def check_no_sync_adds_up(ranks: Ranks) -> None:
    for auto in (False, True):
        model = Tagged(ranks.device, "dp")
        wrapped = DistributedGroupedDataParallel(model, auto)
        for done, inside in enumerate((True, True, False)):
            with wrapped.no_sync() if inside else contextlib.nullcontext():
                wrapped(["dp"], ranks.rank + 1.0).backward()
            if inside:
                assert grads(model)["dp"] == (ranks.rank + 1.0) * (1 + done)
        if not auto:
            wrapped.allreduce_gradients()
        assert grads(model)["dp"] == 3 * (ranks.size + 1) / 2


def check_scaling_options(ranks: Ranks) -> None:
    total = ranks.size * (ranks.size + 1) / 2
    for options, expected in (
        ({"no_scale": True}, total),
        ({"reduce_after": True}, total / ranks.size),
        ({"fp32_allreduce": True}, total / ranks.size),
    ):
        model = Tagged(ranks.device, "dp")
        wrapped = DistributedGroupedDataParallel(model)
        wrapped(["dp"], ranks.rank + 1.0).backward()
        wrapped.allreduce_gradients(**options)
        assert grads(model)["dp"] == expected
    # 256 + 1 is 256 in bfloat16: only a float32 sum sees the ones.
    for auto, options in ((False, {}), (True, {"fp32_allreduce": True})):
        model = Tagged(ranks.device, "dp").bfloat16()
        model.dp.dp_comm = "dp"
        wrapped = DistributedGroupedDataParallel(model, auto, **options)
        wrapped(["dp"], 1024.0 if ranks.rank == 0 else 4.0).backward()
        if not auto:
            wrapped.allreduce_gradients(reduce_after=True, fp32_allreduce=True)
        exact = (1024.0 + 4.0 * (ranks.size - 1)) / ranks.size
        assert grads(model)["dp"] == torch.tensor(exact).bfloat16().item()


def check_starts_with_equal_parameters(ranks: Ranks) -> None:
    for sync in (True, False):
        torch.manual_seed(ranks.rank)
        model = nn.Linear(3, 2, device=ranks.device)
        own = model.weight.detach().clone()
        DistributedGroupedDataParallel(model, need_sync=sync)
        first = own.clone()
        dist.broadcast(first, 0)
        assert torch.equal(model.weight, first if sync else own)
        assert not torch.equal(first, own) or ranks.rank == 0


def check_fastmoe_scale(ranks: Ranks) -> None:
    """Without ``scale_experts`` the experts' gradients are those of the sum of all losses."""
    x = batch(TOKENS, ranks.device)
    results = []
    for scale in (True, False):
        _, part = whole_and_part(ranks, ranks.size, ranks.rank)
        wrapped = DistributedGroupedDataParallel(part, scale_experts=scale)
        for _ in range(2):  # hooks scale what arrives, not what is there
            loss_of(wrapped(x)).backward()
        results.append(part.moe.experts.w_up.grad)
    torch.testing.assert_close(results[0] * ranks.size, results[1])


def check_losses_of_a_pipeline(ranks: Ranks) -> None:
    """The balance losses of all stages and all micro-batches count."""
    if ranks.size != 2:
        return
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    torch.manual_seed(2)
    gate = with_losses(NaiveGate, switch=1.0)
    layers = [make("mlp", 4, ranks.device, gate=gate) for _ in range(2)]
    linears = [nn.Linear(D, D, dtype=torch.float64, device=ranks.device) for _ in range(2)]
    whole = nn.Sequential(linears[0], layers[0], linears[1], layers[1])
    x, target = torch.randn(2, 8, D, dtype=torch.float64).to(ranks.device)
    micro_batches = 4
    for part, wanted in zip(x.chunk(micro_batches), target.chunk(micro_batches), strict=True):
        loss = (whole(part) - wanted).square().mean() + 0.3 * auxiliary_loss(whole)
        (loss / micro_batches).backward()
    expected = {n: p.grad for n, p in whole.named_parameters()}
    stage = copy.deepcopy(whole)[2 * ranks.rank : 2 * ranks.rank + 2]
    stage.zero_grad()
    inject_auxiliary_loss(stage, 0.3)
    device = torch.device(ranks.device)
    schedule = Schedule1F1B(
        PipelineStage(stage, ranks.rank, ranks.size, device),
        micro_batches,
        loss_fn=lambda y, wanted: (y - wanted).square().mean(),
    )
    schedule.step(x) if ranks.rank == 0 else schedule.step(target=target)
    for name, parameter in stage.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def check_clipping_norms(ranks: Ranks) -> None:
    x = batch(TOKENS * ranks.size, ranks.device)
    for norm_type in (2.0, 1.0, math.inf):
        whole, part = whole_and_part(ranks, ranks.size, ranks.rank)
        loss_of(whole(x)).backward()
        wrapped, after = explicit(part)
        loss_of(wrapped(x.split(TOKENS)[ranks.rank])).backward()
        after()
        expected = torch.nn.utils.clip_grad_norm_(whole.parameters(), 0.01, norm_type)
        torch.testing.assert_close(clip_grad_norm_(part, 0.01, norm_type), expected)
        wanted = own_share({n: p.grad for n, p in whole.named_parameters()}, whole, ranks.rank)
        for name, parameter in part.named_parameters():
            torch.testing.assert_close(parameter.grad, wanted[name])
    if ranks.rank == 0:
        part.moe.experts.w_up.grad.fill_(math.nan)
    with pytest.raises(RuntimeError, match="norm of the gradients must be finite, got nan"):
        clip_grad_norm_(part, 1.0, error_if_nonfinite=True)


def check_wrong_arguments(ranks: Ranks) -> None:
    model = nn.Linear(2, 2, device=ranks.device)
    cases = [
        ({"moe": dist.group.WORLD}, "keywords must be named <tag>_group, got 'moe'"),
        ({"moe_group": 3}, "moe_group must be a process group that holds this rank or None, got 3"),
    ]
    for options, message in cases:
        with pytest.raises(TypeError, match=message):
            DistributedGroupedDataParallel(model, **options)
    with pytest.raises(ValueError, match="bucket_bytes must be at least 1, got 0"):
        DistributedGroupedDataParallel(model, bucket_bytes=0)
    embedding = nn.Embedding(4, 2, sparse=True, device=ranks.device)
    wrapped = DistributedGroupedDataParallel(embedding)
    wrapped(torch.tensor([1], device=ranks.device)).sum().backward()
    with pytest.raises(TypeError, match=r"gradients must be dense, got a sparse one of shape \[4"):
        wrapped.allreduce_gradients()
