"""What a layer's ``state_dict`` holds of experts that are spread over ranks. E experts, E_local on a rank.

Every rank has other values under the same name, which no tool that looks at names knows. So these tensors say what they
are to ``torch.distributed.checkpoint``: they refuse it, or they are DTensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from moeops.comm.groups import RankGroup, process_group
from moeops.layers.experts import FusedExperts

if TYPE_CHECKING:
    from moeops.layers.moe import FMoE

_plain = False


@contextlib.contextmanager
def plain_state() -> Iterator[None]:
    """State dicts hold what modules hold, inside of this."""
    global _plain
    before, _plain = _plain, True
    try:
        yield
    finally:
        _plain = before


class RankTensor(Tensor):
    """A tensor of one rank's experts in a state dict: a plain tensor for all but ``torch.distributed.checkpoint``.

    What is computed from it, saved with ``torch.save`` or assigned to a layer is a plain tensor.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch does itself

    def __create_write_items__(self, fqn: str, object: Any) -> NoReturn:
        _refuse(fqn)

    def __create_chunk_list__(self) -> NoReturn:
        _refuse("a tensor of experts")

    def __deepcopy__(self, memo: dict[int, Any]) -> RankTensor:
        memo[id(self)] = copied = self.clone().as_subclass(RankTensor)
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


def _refuse(name: str) -> NoReturn:
    raise RuntimeError(
        "torch.distributed.checkpoint: experts that are spread over ranks must be saved and loaded by "
        "moeops.distributed.save_checkpoint and load_checkpoint, or with DTensors in their state dict, got "
        f"{name}, under whose name every rank has other experts. Call moeops.distributed.use_dtensor_state(model) "
        "before state_dict, or save_checkpoint."
    )


def has_experts(experts: nn.Module, name: str, tensor: Any, num_expert: int) -> bool:
    """A tensor of fused experts has the experts in dimension 0; ``name`` is its own, without wrappers."""
    if not isinstance(tensor, Tensor) or tensor.dim() == 0 or tensor.shape[0] != num_expert:
        return False
    if not isinstance(experts, FusedExperts):
        return True
    # Others belong to its activation, even if their size happens to be that number. An adapter's own tensors have a
    # row per expert, or as many dimensions as the weight: its [r, D] for all experts may have r = num_expert.
    weight = experts.weight_of(name)
    return weight is not None and tensor.dim() in (1, 3 if weight.startswith("w_") else 2)


def as_dtensor(tensor: Tensor, group: RankGroup) -> Tensor:
    """A rank's experts as a part of all ranks': ``[E, ...]``, sharded in dimension 0. Memory is shared."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = DeviceMesh.from_group(process_group(group.name), tensor.device.type)
    return DTensor.from_local(tensor, mesh, [Shard(0)], run_check=False)


def own_experts(value: Any, like: Any, group: RankGroup) -> Any:
    """This rank's part of all ranks' experts, a DTensor or a whole ``[E, ...]``, for a layer that holds ``like``."""
    from torch.distributed.tensor import DTensor, Shard

    if not isinstance(value, Tensor) or not isinstance(like, Tensor) or isinstance(like, DTensor):
        return value
    if not isinstance(value, DTensor):
        share = like.shape[0] if like.dim() > 0 else 0
        whole = value.dim() > 0 and share > 0 and value.shape[0] == share * group.size
        return value.narrow(0, share * group.rank, share) if whole else value
    if value.placements != (Shard(0),) or value.device_mesh.size() != group.size:
        raise ValueError(
            f"load_state_dict: a DTensor of experts must be sharded in dimension 0 over the {group.size} ranks of "
            f"group {group.name!r}, got {value.placements} on {value.device_mesh}. Redistribute it, or pass the "
            "rank's own experts as a plain tensor."
        )
    return value.to_local()


def hold_experts(layer: FMoE, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """A state dict hook of layers: have a layer's experts say what they are."""
    group = layer.moe_ranks
    if _plain or group is None:
        return
    start = f"{prefix}experts."
    for key, value in state.items():
        # With keep_vars=True there are parameters, which stay what they are.
        if not key.startswith(start) or not isinstance(value, Tensor) or value.requires_grad:
            continue
        if hasattr(value, "device_mesh"):
            # FSDP2 knows the ranks that have the same experts; its DTensor asks its local tensor.
            sharded: Any = value
            sharded._local_tensor = sharded._local_tensor.as_subclass(RankTensor)
        elif layer.dtensor_state and value.dim() > 0:
            state[key] = as_dtensor(value, group)
        else:
            state[key] = value.as_subclass(RankTensor)


def take_experts(layer: FMoE, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A hook before ``load_state_dict``: make plain tensors of a layer's experts."""
    group = layer.moe_ranks
    if group is None:
        return
    start = f"{prefix}experts."
    own: dict[str, Tensor] | None = None
    for key, value in state.items():
        if not key.startswith(start):
            continue
        if isinstance(value, RankTensor):
            state[key] = value.as_subclass(Tensor)
        elif layer.dtensor_state or hasattr(value, "device_mesh"):
            if own is None:
                own = dict(layer.experts.named_parameters())
                own.update(layer.experts.named_buffers())
            state[key] = own_experts(value, own.get(key[len(start) :]), group)
