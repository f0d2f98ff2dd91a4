"""Experts of a transformers model spread over ranks, by moeops' exchange. T tokens, K experts per token, D width."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface

from moeops.comm.groups import rank_group
from moeops.dispatch.base import ExpertRanks
from moeops.dispatch.options import Exact, build_dispatcher
from moeops.integrations.transformers.experts import NAME, run_module
from moeops.types import Routing, TokenPlan


def register() -> None:
    """Make ``DistributedConfig(ep_implementation="moeops")`` known to transformers. Safe to call again."""
    EPImplementationInterface.register(NAME, MoeopsExpertParallel)


class MoeopsExpertParallel(EPImplementation):
    """Send each token once per chosen expert to the rank of the expert, run the experts there, sum the answers here.

    Ranks may have different numbers of tokens, 0 included. Ranks of a tensor-parallel group hold the same tokens: each
    sends an equal part of them, and the parts of the result are gathered. The experts must run on moeops
    (``experts_implementation="moeops"``): rows that arrive are planned from the counts, without ids.

    Args:
        experts: the experts of this rank, a decorated module of transformers.
        ep_mesh: ranks that hold the layer's experts, each a range of them.
        tp_mesh: ranks that hold the same tokens.
    Gradients: tokens, routing weights, parameters.  Host sync: one copy per forward, as for ``dispatch="exact"``.
    """

    def __init__(self, experts: Any, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        group = rank_group(ep_mesh.get_group()) if ep_mesh.size() > 1 else None
        ranks = ExpertRanks(type(experts).__name__, self.num_local_experts, group)
        self.dispatcher = build_dispatcher(Exact(), ranks)
        self.experts = experts

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Tokens ``[T, D]`` of this rank to their weighted sums; ids count the experts of all ranks."""
        implementation = self.experts.config._experts_implementation
        if implementation != NAME:
            raise ValueError(
                f"moeops' expert parallelism: experts_implementation must be {NAME!r}, got {implementation!r}. "
                f'Call model.set_experts_implementation("{NAME}"), or choose another ep_implementation.'
            )
        num_tokens, width = hidden_states.shape
        given: tuple[Any, ...] = (hidden_states, top_k_index, top_k_weights)
        is_shared = self.tp_mesh.size() > 1
        if is_shared:
            given = tuple(self._take_part(t) for t in given)
        x, topk_ids, topk_weights = given
        routing = Routing(topk_ids, topk_weights)
        y = self.dispatcher.run(routing, x, self._run_rows, self._run_block)
        if not is_shared:
            return y
        part = y.contiguous()
        shape = torch.Size((num_tokens, width))
        whole = DTensor.from_local(part, self.tp_mesh, [Shard(0)], shape=shape, stride=(width, 1))
        return whole.full_tensor()

    def _take_part(self, tensor: Tensor) -> Tensor:
        """This rank's part of tokens that all ranks of the tensor-parallel group hold."""
        whole = DTensor.from_local(tensor, self.tp_mesh, [Replicate()], run_check=False)
        return whole.redistribute(self.tp_mesh, [Shard(0)]).to_local()

    def _run_block(self, rows: Tensor, ones: Tensor, plan: TokenPlan) -> Tensor:
        return run_module(self.experts, rows, plan, ones)

    def _run_rows(self, *_: Any) -> Tensor:
        raise AssertionError("the dispatcher calls the experts as one block")
