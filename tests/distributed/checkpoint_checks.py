"""Checkpoints of jobs of 4, 2 and 1 ranks, loaded by jobs of 1, 2 and 4; run by test_checkpoint.py.

One set of processes plays all jobs, one after the other. Gradients are made up, by element of the whole model, so that
training is the same to the last bit however the experts are spread, and every rank knows the truth by itself.
"""

from __future__ import annotations

import os
import time
import traceback
import zlib
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parametrize, prune

from moeops import FMoE, FMoETransformerMLP
from moeops.distributed import (
    load_checkpoint,
    merge_checkpoint,
    read_extra,
    save_checkpoint,
)
from moeops.distributed.checkpoint import files
from processes import Ranks, start_rank

E, D, H = 4, 6, 5
SHARDED_H = 4
OPTIMIZERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, amsgrad=True),
    "sgd": lambda groups: torch.optim.SGD(groups, momentum=0.9),
}


class OneExpert(nn.Module):
    """An expert with the names and shapes of FastMoE's."""

    def __init__(self, d_model):
        super().__init__()
        self.htoh4, self.h4toh = nn.Module(), nn.Module()
        self.htoh4.weight = nn.Parameter(torch.empty(1, H, d_model))
        self.htoh4.bias = nn.Parameter(torch.empty(1, H))
        self.h4toh.weight = nn.Parameter(torch.empty(1, d_model, H))
        self.h4toh.bias = nn.Parameter(torch.empty(1, d_model))

    def forward(self, rows):
        hidden = torch.relu(rows @ self.htoh4.weight[0].T + self.htoh4.bias)
        return hidden @ self.h4toh.weight[0].T + self.h4toh.bias


class Net(nn.Module):
    """Experts of all kinds, and what is not expert."""

    def __init__(self, ranks: Ranks, mlp: str = "fused", num_experts: int = E, num_shards: int = 1):
        super().__init__()
        options = {"top_k": 2, "world_size": ranks.size}
        share = num_experts // ranks.size
        self.first = nn.Linear(D, D)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        if mlp == "fused":
            self.mlp = FMoETransformerMLP(share, D, H, activation="relu", **options)
        else:
            self.mlp = FMoE(share, D, expert=OneExpert, **options)
        self.each = FMoE(share, D, expert=lambda d_model: nn.Linear(d_model, D), **options)
        options.update(activation="swiglu", expert_tensor_parallel_size=num_shards)
        options.update(shared_expert=7, shared_expert_gate="softmax")
        self.shards = FMoETransformerMLP(share * num_shards, D, SHARDED_H, **options)
        self.copies = FMoETransformerMLP(3, D, H, activation="swiglu", bias=False)
        self.to(ranks.device, torch.float64)

    def forward(self, x):
        return self.copies(self.shards(self.each(self.mlp(self.first(x)))))


def alone(ranks: Ranks) -> Ranks:
    return Ranks(0, 1, ranks.device)


def made_up(name: str, shape, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + step)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def share_of(net: Net, ranks: Ranks, name: str, like: torch.Tensor, step: int) -> torch.Tensor:
    """This rank's part of a made-up tensor of the whole model; the same whether experts are fused or not."""
    layer, _, rest = name.partition(".experts.")
    first = ranks.rank * E // ranks.size
    if layer == "shards" and rest:
        return shard_of(net.shards.expert_tensor_parallel_size, ranks, rest, step)
    if layer == "copies" or not rest:
        return made_up(name, like.shape, step).to(ranks.device)
    if not rest[0].isdigit():
        whole = made_up(f"{layer}.{rest}", (E, *like.shape[1:]), step)
        return whole[first : first + E // ranks.size].to(ranks.device)
    index, _, rest = rest.partition(".")
    if layer == "each":
        return made_up(f"{layer}.{int(index) + first}.{rest}", like.shape, step).to(ranks.device)
    fused = {"htoh4.weight": "w_up", "htoh4.bias": "b_up"}.get(rest, rest)
    fused = {"h4toh.weight": "w_down", "h4toh.bias": "b_down"}.get(fused, fused)
    whole = made_up(f"{layer}.{fused}", (E, *like.shape[1:]), step)
    return whole[int(index) + first :][:1].to(ranks.device)


def shard_of(num_shards: int, ranks: Ranks, name: str, step: int) -> torch.Tensor:
    """This rank's hidden units of its experts; of the last bias this rank's outputs."""
    up = (E, 2 * SHARDED_H)
    shapes = {"w_up": (*up, D), "b_up": up, "w_down": (E, D, SHARDED_H), "b_down": (E, D)}
    whole = made_up(f"shards.{name}", shapes[name], step).to(ranks.device)
    expert_rank, shard = divmod(ranks.rank, num_shards)
    experts = whole.chunk(ranks.size // num_shards)[expert_rank]
    if name in ("w_up", "b_up"):
        return torch.cat([half.chunk(num_shards, 1)[shard] for half in experts.chunk(2, 1)], 1)
    return experts.tensor_split(num_shards, {"w_down": 2, "b_down": 1}[name])[shard]


def train(net: Net, optimizer, ranks: Ranks, steps: range) -> None:
    for step in steps:
        for name, parameter in net.named_parameters():
            value = share_of(net, ranks, name, parameter, step)
            if step == 0:
                parameter.data.copy_(value)
            else:
                parameter.grad = value
        if step > 0:
            optimizer.step()
            net.count += 1


def build(ranks: Ranks, optimizer: str = "adamw", mlp: str = "fused", steps: int = 0):
    """A model with an optimizer in two groups, fresh or after some steps of training."""
    torch.manual_seed(5 + ranks.rank)
    # From 4 to 1 ranks: 4, 2 and 1 shards of an expert with one optimizer, 2, 1 and 1 with the other.
    num_shards = ranks.size if optimizer == "sgd" else (ranks.size + 1) // 2
    net = Net(ranks, mlp, num_shards=num_shards)
    groups = [
        {"params": [p for n, p in net.named_parameters() if ".experts." in n], "lr": 0.25},
        {"params": [p for n, p in net.named_parameters() if ".experts." not in n], "lr": 0.5},
    ]
    made = OPTIMIZERS[optimizer](groups)
    if steps:
        train(net, made, ranks, range(steps + 1))
    else:
        for group in made.param_groups:
            group["lr"] = 99.0
    return net, made


def all_values(net: Net, optimizer) -> dict[str, object]:
    names = {parameter: name for name, parameter in net.named_parameters()}
    values: dict[str, object] = dict(net.state_dict())
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            values[f"{names[parameter]}/{key}"] = value
    values["lr"] = [group["lr"] for group in optimizer.param_groups]
    return values


def assert_equal(found: dict[str, object], expected: dict[str, object]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, expected[name]), name
            assert value.dtype == expected[name].dtype, name
        else:
            assert value == expected[name], name


def assert_loads(path, ranks: Ranks, optimizer: str, steps: int = 2, mlp: str = "fused") -> None:
    """What loads is the state of that step, to the bit, and training goes on from there."""
    net, made = build(ranks, optimizer, mlp)
    for extra in (read_extra(path), load_checkpoint(path, net, made)):
        assert extra["step"] == steps
        assert torch.equal(extra["random"], torch.arange(5))
    truth, truth_made = build(ranks, optimizer, mlp, steps)
    assert_equal(all_values(net, made), all_values(truth, truth_made))
    x = made_up("x", (7, D), 0).to(ranks.device)
    assert torch.equal(net(x), truth(x))
    for model, its in ((net, made), (truth, truth_made)):
        train(model, its, ranks, range(steps + 1, steps + 3))
    assert_equal(all_values(net, made), all_values(truth, truth_made))


def save(path, ranks: Ranks, optimizer: str = "adamw", steps: int = 2) -> None:
    net, made = build(ranks, optimizer, steps=steps)
    save_checkpoint(path, net, made, {"step": steps, "random": torch.arange(5)})


def save_all(ranks: Ranks, folder: Path) -> None:
    """One checkpoint per optimizer by a job of this size."""
    for optimizer in OPTIMIZERS:
        save(folder / f"{optimizer}{ranks.size}", ranks, optimizer, steps=1)
        save(folder / f"{optimizer}{ranks.size}", ranks, optimizer)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "digest_of", _fail_on(ranks, ranks.size - 1))
            with pytest.raises((OSError, RuntimeError), match="no room") as caught:
                save(folder / f"{optimizer}{ranks.size}", ranks, optimizer, steps=3)
            assert f"rank {ranks.size - 1} of {ranks.size}" in str(caught.value) or (
                ranks.rank == ranks.size - 1
            )
        left = [path.name for path in (folder / f"{optimizer}{ranks.size}").iterdir()]
        _meet(ranks)
        assert ranks.rank or len(left) == 2, left
    if ranks.size <= 2:
        save_checkpoint(folder / f"two_experts{ranks.size}", Net(ranks, num_experts=2))
    if ranks.size == 1:
        save_checkpoint(folder / "rows", *with_state_by_rows(ranks, 1))


def with_state_by_rows(ranks: Ranks, num_shards: int):
    """A model with an optimizer that keeps numbers of whole rows and columns."""
    net = Net(ranks, num_shards=num_shards)
    optimizer = torch.optim.Adafactor(net.shards.experts.parameters())
    net.shards(made_up("x", (7, D), 0).to(ranks.device)).square().sum().backward()
    optimizer.step()
    return net, optimizer


def load_all(ranks: Ranks, folder: Path, sizes: list[int]) -> None:
    """What jobs of all sizes saved."""
    for size in sizes:
        for optimizer in OPTIMIZERS:
            assert_loads(folder / f"{optimizer}{size}", ranks, optimizer)
        # One size is enough: a merged file does not depend on it.
        for mlp in ("fused", "list") if size == sizes[0] else ():
            for layout in ("fused", "per_expert"):
                path = folder / f"{layout}{size}.pt"
                if ranks.rank == 0 and not path.exists():
                    merge_checkpoint(folder / f"adamw{size}", path, layout)
                _meet(ranks)
                assert_loads(path, ranks, "adamw", mlp=mlp)


class LowRank(nn.Module):
    """An adapter of each expert's weight."""

    def __init__(self, weight, rows: int = 2):
        super().__init__()
        num_expert, out, width = weight.shape
        self.a = nn.Parameter(torch.randn(num_expert, rows, width, dtype=weight.dtype))
        self.b = nn.Parameter(torch.randn(num_expert, out, rows, dtype=weight.dtype))
        self.scale = nn.Parameter(torch.randn(num_expert, dtype=weight.dtype))
        self.to(weight.device)

    def forward(self, weight):
        return weight + self.scale[:, None, None] * (self.b @ self.a)


def adapt(net: Net, seed: int) -> Net:
    """Adapters on one projection, masks on the other; every rank's are others."""
    torch.manual_seed(seed)
    experts = net.mlp.experts
    parametrize.register_parametrization(experts, "w_up", LowRank(experts.w_up))
    prune.random_unstructured(experts, "w_down", amount=0.5)
    prune.random_unstructured(net.shards.experts, "w_up", amount=0.5)
    return net


def adapted(ranks: Ranks, folder: Path) -> None:
    """What adapters and pruning make of experts' weights belongs to the experts, in shards too."""
    num_shards = 2 if ranks.size > 1 else 1
    nets = []
    for seed in (10, 20):
        torch.manual_seed(seed)  # what is not the experts' is the same on every rank
        nets.append(adapt(Net(ranks, num_shards=num_shards), seed + 1 + ranks.rank))
    net, other = nets
    path = folder / f"adapted{ranks.size}"
    save_checkpoint(path, net)
    load_checkpoint(path, other)
    assert_equal(other.state_dict(), dict(net.state_dict()))
    whole = load_whole(path, "mlp.experts.parametrizations.w_up.0.a")
    first = ranks.rank * E // ranks.size
    own = net.mlp.experts.parametrizations.w_up[0].a
    assert torch.equal(whole[first : first + len(own)].to(ranks.device), own)
    if num_shards > 1:
        experts = net.shards.experts
        parametrize.register_parametrization(experts, "w_down", LowRank(experts.w_down))
        with pytest.raises(NotImplementedError, match=r"shape of the weight w_down.*w_down\.0\.a"):
            save_checkpoint(path, net)


def load_whole(path: Path, name: str) -> torch.Tensor:
    """A tensor of all experts; every rank merges into a file of its own."""
    out = path.with_name(f"{path.name}-{os.getpid()}.pt")
    merge_checkpoint(path, out)
    return torch.load(out, weights_only=True)["model"][name]


def refuse(ranks: Ranks, folder: Path) -> None:
    """What does not fit is refused on every rank, and nothing is changed."""
    good = folder / f"adamw{ranks.size}"
    net, made = build(ranks, steps=1)
    before = {name: value.clone() for name, value in net.state_dict().items()}

    def fails(kind, match, path=good, model=net, optimizer=made):
        with pytest.raises(kind, match=match):
            load_checkpoint(path, model, optimizer)
        _meet(ranks)

    fails(FileNotFoundError if ranks.rank == 0 else RuntimeError, "nothing", folder / "nothing")
    two = folder / "two_experts2"
    advice = "cannot be shared equally by 4" if ranks.size == 4 else "num_expert="
    fails(ValueError, f"4 experts of mlp.experts on .* ranks and 2 .*{advice}", two, optimizer=None)
    more = Net(ranks)
    more.second = nn.Linear(D, D).double()
    fails(
        ValueError, "2 missing from the checkpoint: model/second.bias", model=more, optimizer=None
    )
    fewer = Net(ranks)
    del fewer.each
    fails(ValueError, "unexpected in the checkpoint: model/each.exp", model=fewer, optimizer=None)
    other = Net(ranks)
    other.first = nn.Linear(D, D + 1).double()
    fails(ValueError, "model/first.weight must have the shape", model=other, optimizer=None)
    fails(ValueError, "float32 in the model", model=Net(ranks).float(), optimizer=None)
    fails(ValueError, "checkpoint without one", folder / "two_experts2")
    _, sgd = build(ranks, "sgd")
    with pytest.raises(ValueError, match="optimizer must train parameters of the model only"):
        load_checkpoint(good, net, sgd)
    one = torch.optim.AdamW(net.parameters())
    fails(ValueError, r"parameter group 0 must be one of the checkpoint's", optimizer=one)
    if ranks.size > 1:
        uneven = Net(ranks)
        uneven.first = nn.Linear(D, D + ranks.rank).double()
        fails(ValueError, "must be the same on every rank", model=uneven, optimizer=None)
        with pytest.raises(ValueError, match="must be the same on every rank"):
            save_checkpoint(good, uneven)
        made.param_groups[0]["lr"] = float(ranks.rank)
        with pytest.raises(ValueError, match="options of parameter group 0"):
            save_checkpoint(good, net, made)
        step = next(iter(made.state.values()))["step"]
        made.param_groups[0]["lr"] = 0.25
        step += ranks.rank
        with pytest.raises(ValueError, match="/step must be the same on every rank"):
            save_checkpoint(good, net, made)
        by_rows = with_state_by_rows(ranks, 2)
        with pytest.raises(NotImplementedError, match="state of experts in shards must be a num"):
            save_checkpoint(good, *by_rows)
        with pytest.raises(NotImplementedError, match="state of sharded parameters must have"):
            load_checkpoint(folder / "rows", *by_rows)
        own = Net(ranks)
        own.mlp.experts.scale = nn.Parameter(torch.ones(99))
        with pytest.raises(NotImplementedError, match=r"mlp\.experts\.scale"):
            save_checkpoint(good, own)
    _meet(ranks)
    damaged = [*sorted(good.glob("data-*/*")), good / files.INDEX]
    assert len(damaged) == ranks.size + 2  # torch's index and ours
    for file in damaged:
        _meet(ranks)
        if ranks.rank == 0:
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 4
            file.write_bytes(data)
        _meet(ranks)
        fails((ValueError, RuntimeError), rf"{file.name} is damaged")
        if ranks.rank == 0:
            data[len(data) // 2] ^= 4
            file.write_bytes(data)
    _meet(ranks)
    assert_equal(net.state_dict(), before)
    assert_loads(good, ranks, "adamw")


def sharded(ranks: Ranks, folder: Path) -> None:
    """FSDP2 over one mesh dimension and experts over the other: the same checkpoint."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    kind = "cuda" if ranks.device.startswith("cuda") else "cpu"
    mesh = init_device_mesh(kind, (2, 2), mesh_dim_names=("data", "experts"))
    everyone = init_device_mesh(kind, (4,))

    def make():
        torch.manual_seed(3)
        shards = {"expert_tensor_parallel_size": 2, "device_mesh": mesh["experts"]}
        net = nn.Sequential(
            nn.Linear(D, D),
            FMoETransformerMLP(E // 2, D, H, activation="relu", device_mesh=mesh["experts"]),
            FMoETransformerMLP(E, D, SHARDED_H, activation="swiglu", **shards),
        ).to(ranks.device)
        for layer in net[1:]:
            fully_shard(layer.experts, mesh=mesh["data"])
        fully_shard(net, mesh=everyone)
        return net, torch.optim.AdamW(net.parameters(), lr=0.5)

    net, made = make()
    x = torch.randn(6, D, device=ranks.device)
    net(x).square().sum().backward()
    made.step()
    save_checkpoint(folder / "sharded", net, made)
    loaded, its = make()
    load_checkpoint(folder / "sharded", loaded, its)
    for model, optimizer in ((net, made), (loaded, its)):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    for mine, truth in zip(loaded.parameters(), net.parameters(), strict=True):
        assert torch.equal(mine.to_local(), truth.to_local())
    # Without FSDP the whole is there, on however many ranks.
    whole = nn.Sequential(
        nn.Linear(D, D),
        FMoETransformerMLP(E // 4, D, H, activation="relu", world_size=4),
        FMoETransformerMLP(E // 4, D, SHARDED_H, activation="swiglu", world_size=4),
    ).to(ranks.device)
    adam = torch.optim.AdamW(whole.parameters())
    load_checkpoint(folder / "sharded", whole, adam)
    again, again_adam = make()
    save_checkpoint(folder / "again", whole, adam)
    load_checkpoint(folder / "again", again, again_adam)
    reloaded, reloaded_adam = make()
    load_checkpoint(folder / "sharded", reloaded, reloaded_adam)
    for a, b in zip(again.parameters(), reloaded.parameters(), strict=True):
        assert torch.equal(a.to_local(), b.to_local())
        moment, other = again_adam.state[a]["exp_avg"], reloaded_adam.state[b]["exp_avg"]
        assert torch.equal(moment.to_local(), other.to_local())


def _fail_on(ranks: Ranks, rank: int):
    right = files.digest_of

    def digest_of(file):
        if ranks.rank == rank:
            raise OSError("no room on the disk")
        return right(file)

    return digest_of


def _meet(ranks: Ranks) -> None:
    if dist.is_initialized():
        dist.barrier()


def worker(rank: int, sizes: list[int], backend: str, folder: str) -> None:
    """Play a job of each size: all save, then all load."""
    report = Path(folder) / f"rank{rank}.txt"
    what = "start"
    try:
        for number, size in enumerate([*sizes, *reversed(sizes)]):
            done = Path(folder) / f"job{number}" / "done"
            done.parent.mkdir(exist_ok=True)
            if rank >= size:
                while not done.exists():  # the job of others; the parent has the time-out
                    if any(Path(folder).glob("rank*.txt")):
                        os._exit(0)
                    time.sleep(0.02)
                continue
            store = done.parent
            if size > 1:
                ranks = start_rank(rank, size, backend, str(store), 60)
            else:
                torch.set_num_threads(1)
                ranks = Ranks(0, 1, "cpu" if backend == "gloo" else "cuda:0")
            steps = [save_all] if number < len(sizes) else [load_all, refuse]
            if number < len(sizes):
                steps += {4: [sharded], 2: [adapted]}.get(size, [])
            for step in steps:
                what = f"{step.__name__} of {size} ranks"
                args = (sizes,) if step is load_all else ()
                step(ranks, Path(folder), *args)
            if size > 1:
                dist.barrier()
                dist.destroy_process_group()
            done.touch()
    except BaseException:
        report.write_text(f"rank {rank} in {what}:\n{traceback.format_exc()}")
        os._exit(1)
