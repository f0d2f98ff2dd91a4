"""Checks of moeops in Megatron-Core's distributed checkpoints, run by every rank of a group."""

from __future__ import annotations

import itertools

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.optimizer import (
    get_param_id_to_sharded_param_map,
    optim_state_to_sharding_state,
)
from megatron_checks import GROUPS, assert_same, run, tokens
from megatron_models import E, H, make_config, make_gpt, put, use_groups

from moeops.integrations.megatron import MoeopsExperts, fmoefy
from processes import Ranks


def describe(model, **metadata) -> dict:
    """What Megatron saves or loads of a model."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return model.sharded_state_dict(metadata={"dp_cp_group": group, **metadata})


def save(state: dict, folder) -> None:
    if torch.distributed.get_rank() == 0:
        folder.mkdir()
    torch.distributed.barrier()
    dist_checkpointing.save(state, str(folder))


BUILDERS = {
    "stock": lambda: make_gpt(make_config()),
    "spec": lambda: make_gpt(make_config(), MoeopsExperts),
    "fmoefy": lambda: put(fmoefy(make_gpt(make_config(dense=True)), num_experts=E, d_hidden=H)),
}


def check_checkpoints(ranks: Ranks) -> None:
    """What one class has saved, another loads, on another number of ranks."""
    every = [{}, *GROUPS[ranks.size]] if ranks.size > 1 else [{}] * 3
    ids = tokens()
    others = itertools.cycle(BUILDERS)
    saved = [("stock", every[-1], False), ("spec", every[1], False), ("spec", every[2], True)]
    for place, (kind, sizes, single) in enumerate([*saved, ("fmoefy", every[-2], False)]):
        use_groups(**sizes)
        model = BUILDERS[kind]()
        metadata = {"singleton_local_shards": True} if single else {}
        folder = ranks.folder / f"checkpoint{place}"
        save(describe(model, **metadata), folder)
        expected = run(model, ids)
        for own in every:
            use_groups(**own)
            loaded = BUILDERS[next(others)]()
            with torch.no_grad():
                for parameter in loaded.parameters():
                    parameter.zero_()
            loaded.load_state_dict(
                dist_checkpointing.load(describe(loaded, **metadata), str(folder))
            )
            assert_same(run(loaded, ids), expected)


def check_optimizer_states(ranks: Ranks) -> None:
    """Those of Adam are saved beside the weights, and go on where other ranks load them."""
    ids = tokens()

    def with_states(kind: str, sizes: dict):
        use_groups(**sizes)
        model = BUILDERS[kind]()
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        run(model, ids).backward()
        optimizer.step()
        return model, optimizer

    def describe_both(model, optimizer) -> dict:
        state, own = describe(model), optimizer.state_dict()
        parameters = get_param_id_to_sharded_param_map(state, model.parameters())
        optim_state_to_sharding_state(own, parameters, exclude_keys=("step",))
        return {"model": state, "optimizer": own}

    def loss_after_a_step(model, optimizer) -> torch.Tensor:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        return run(model, ids)

    folder = ranks.folder / "states"
    saved = with_states("spec", GROUPS[ranks.size][0])
    save(describe_both(*saved), folder)
    expected = loss_after_a_step(*saved)
    for kind, sizes in (("spec", GROUPS[ranks.size][-1]), ("fmoefy", {})):
        model, optimizer = with_states(kind, sizes)
        loaded = dist_checkpointing.load(describe_both(model, optimizer), str(folder))
        model.load_state_dict(loaded["model"])
        for state in loaded["optimizer"]["state"].values():
            state["step"] = torch.tensor(1.0)
        optimizer.load_state_dict(loaded["optimizer"])
        assert_same(loss_after_a_step(model, optimizer), expected)
