"""What a checkpoint calls a model's tensors, and which parts of each this rank holds. E experts, W ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moeops.dispatch.shards import ShardSpan
from moeops.distributed.grad_sync import DistributedGroupedDataParallel
from moeops.layers._state import has_experts, plain_state
from moeops.layers.experts import FusedExperts
from moeops.layers.walk import clean_name, named_layers


class Piece(NamedTuple):
    """A part of a tensor that may be spread over ranks. A rank has one of each tensor, or several with gaps between.

    Attributes:
        local: the part, a plain tensor.
        offset: where it starts in the whole, per dimension.
        shape: of the whole.
    """

    local: Tensor
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def dtype(self) -> str:
        """Type of the elements, as a checkpoint spells it."""
        return str(self.local.dtype).removeprefix("torch.")


class ExpertLayer(NamedTuple):
    """A layer's experts: their prefix among the names, and which of all experts are here.

    Attributes:
        prefix: such as ``"blocks.0.experts."``.
        num_local: experts of this rank.
        rank: this rank's place among those that hold different experts.
        size: how many ranks do.
        names: tensors with the experts in dimension 0; ``None`` where every expert is a module.
        spans: what of whole experts each of these tensors holds, by name; ``None`` where experts are whole.
    """

    prefix: str
    num_local: int
    rank: int
    size: int
    names: tuple[str, ...] | None
    spans: dict[str, ShardSpan] | None = None

    @property
    def num_experts(self) -> int:
        """``E``."""
        return self.num_local * self.size

    @property
    def is_spread(self) -> bool:
        """Whether other ranks hold other experts, or other shards of these."""
        return self.size > 1 or self.spans is not None

    def record(self) -> dict[str, Any]:
        """What a checkpoint says of the layer, the same on every rank."""
        names = None if self.names is None else list(self.names)
        return {"prefix": self.prefix, "num_experts": self.num_experts, "names": names}


class LocalState(NamedTuple):
    """What one rank saves, or wants.

    Attributes:
        pieces: parts of tensors by key, ``model/NAME`` or ``optimizer/NAME/STATE``; at least one of each.
        objects: plain Python values by key.
        groups: the optimizer's parameter groups, ``params`` being names; ``None`` without an optimizer.
        equal: numbers by key that must not differ between ranks.
    """

    pieces: dict[str, list[Piece]]
    objects: dict[str, Any]
    groups: list[dict[str, Any]] | None
    equal: dict[str, float]


def unwrap(model: nn.Module) -> nn.Module:
    """Take data-parallel wrappers and torch.compile's off."""
    from torch.nn.parallel import DistributedDataParallel

    while True:
        if isinstance(model, (DistributedDataParallel, DistributedGroupedDataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]  # a Module, as asked
        else:
            return model


class ModelState:
    """A model's tensors under names that do not depend on the number of ranks.

    Expert ``i`` of a rank's ``nn.ModuleList`` gets its number among all experts; a fused tensor keeps its name and
    becomes a part of the whole ``[E, ...]``. What FSDP2 has sharded is a part as well, of the rank's own experts.
    """

    def __init__(self, op: str, model: nn.Module) -> None:
        self.op = op
        self.model = unwrap(model)
        self.layers = list(_expert_layers(op, self.model))
        nested = [
            (a.prefix, b.prefix)
            for a in self.layers
            for b in self.layers
            if a is not b and (a.is_spread or b.is_spread) and a.prefix.startswith(b.prefix)
        ]
        if nested:
            raise NotImplementedError(
                f"{op}: experts that are spread over ranks must not hold layers of experts, got {nested[0][0]!r} in "
                f"{nested[0][1]!r}. Give both layers world_size=1."
            )
        self.tensors: dict[str, Tensor] = {}  # as state_dict() names them
        self.extra_states: dict[str, Any] = {}
        with plain_state():
            tensors = self.model.state_dict()
        for raw, value in tensors.items():
            if isinstance(value, Tensor):
                self.tensors[raw] = value
            else:
                layer = self.layer_of(clean_name(raw))
                if layer is not None and layer.is_spread:
                    raise NotImplementedError(
                        f"{op}: experts that are spread over ranks must hold tensors only, got extra state {raw!r}. "
                        "Register a buffer instead."
                    )
                self.extra_states[raw] = value

    def layer_of(self, name: str) -> ExpertLayer | None:
        """The layer whose experts hold a tensor."""
        for layer in self.layers:
            if name.startswith(layer.prefix):
                return layer
        return None

    def name(self, raw: str) -> str:
        """What a checkpoint calls a tensor."""
        name = clean_name(raw)
        layer = self.layer_of(name)
        if layer is None or layer.names is not None:
            return name
        index, _, rest = name[len(layer.prefix) :].partition(".")
        return f"{layer.prefix}{int(index) + layer.rank * layer.num_local}.{rest}"

    def expert_dim(self, raw: str) -> ExpertLayer | None:
        """The layer of a tensor that has the experts in dimension 0."""
        name = clean_name(raw)
        layer = self.layer_of(name)
        if layer is None or layer.names is None:
            return None
        if name[len(layer.prefix) :] in layer.names:
            return layer
        if layer.is_spread:
            raise NotImplementedError(
                f"{self.op}: tensors of experts that are spread over ranks must have the rank's {layer.num_local} "
                f"experts in dimension 0, and those of an adapter as many dimensions as the weight, got {name} "
                f"{list(self.tensors[raw].shape)}. Each rank has one of its own, which belongs to no expert: make it a "
                "constant, or one row per expert."
            )
        return None

    def span(self, raw: str) -> ShardSpan | None:
        """What of a tensor of whole experts is here, ``None`` for all of it."""
        layer = self.expert_dim(raw)
        if layer is None or layer.spans is None:
            return None
        return layer.spans[clean_name(raw)[len(layer.prefix) :]]

    def pieces(self, raw: str, tensor: Tensor) -> list[Piece]:
        """This rank's parts of a tensor of the model, or of one alike."""
        return parts_of(tensor, self.expert_dim(raw), self.span(raw))

    def model_pieces(self) -> dict[str, list[Piece]]:
        """Every tensor of the model, by key."""
        return {f"model/{self.name(raw)}": self.pieces(raw, t) for raw, t in self.tensors.items()}

    def parameter_names(self, optimizer: torch.optim.Optimizer) -> list[tuple[str, nn.Parameter]]:
        """The optimizer's parameters in its own order, with their names in the model."""
        names = {parameter: raw for raw, parameter in self.model.named_parameters()}
        found = []
        for number, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                if parameter not in names:
                    raise ValueError(
                        f"{self.op}: optimizer must train parameters of the model only, got another one, "
                        f"{list(parameter.shape)}, in group {number}. Pass the model that it trains."
                    )
                found.append((names[parameter], parameter))
        return found

    def save(self, optimizer: torch.optim.Optimizer | None) -> LocalState:
        """All that is to be saved."""
        objects = {f"model/{clean_name(raw)}": value for raw, value in self.extra_states.items()}
        state = LocalState(
            self.model_pieces(), objects, None if optimizer is None else [], equal={}
        )
        if optimizer is None:
            return state
        packed = optimizer.state_dict()
        parameters = iter(self.parameter_names(optimizer))
        for group in packed["param_groups"]:
            members = []
            for index in group["params"]:
                raw, parameter = next(parameters)
                members.append(self.name(raw))
                for key, value in packed["state"].get(index, {}).items():
                    self._save_value(state, raw, parameter, key, value)
            options = {k: v for k, v in group.items() if k not in ("params", "param_names")}
            assert state.groups is not None
            state.groups.append({**options, "params": members})
        return state

    def _save_value(
        self, state: LocalState, raw: str, parameter: Tensor, key: str, value: Any
    ) -> None:
        """Add one value of a parameter's optimizer state."""
        name = f"optimizer/{self.name(raw)}/{key}"
        if not isinstance(value, Tensor):
            state.objects[name] = value
            return
        layer = self.expert_dim(raw)
        if value.dim() == 0 or (value.numel() == 1 and value.dim() != parameter.dim()):
            state.pieces[name] = parts_of(value, None, None)
            if layer is not None and layer.is_spread:
                state.equal[name] = float(value)
            return
        span = self.span(raw)
        if span is not None and value.shape != parameter.shape:
            raise NotImplementedError(
                f"{self.op}: optimizer state of experts in shards must be a number or have the parameter's shape, got "
                f"{key} {list(value.shape)} of {raw} {list(parameter.shape)}. Use an optimizer that treats every "
                "element alike."
            )
        if layer is not None and layer.size > 1 and value.shape[0] != layer.num_local:
            raise NotImplementedError(
                f"{self.op}: optimizer state of experts that are spread over ranks must be a number or have the "
                f"rank's {layer.num_local} experts in dimension 0, got {key} {list(value.shape)} of {raw}. Use an "
                "optimizer that treats every row alike."
            )
        whole = layer is not None and value.shape[0] == layer.num_local
        state.pieces[name] = parts_of(value, layer if whole else None, span if whole else None)

    def wanted_state(
        self, optimizer: torch.optim.Optimizer, known: dict[str, tuple[tuple[int, ...], str]]
    ) -> dict[str, tuple[list[Piece], Tensor]]:
        """Room for what a checkpoint knows of this rank's optimizer state: the parts, and the tensor they are in."""
        keys: dict[str, list[str]] = {}
        for key in known:
            if key.startswith("optimizer/"):
                keys.setdefault(key[len("optimizer/") :].rpartition("/")[0], []).append(key)
        room = {}
        for raw, parameter in self.parameter_names(optimizer):
            layer = self.expert_dim(raw)
            for key in keys.get(self.name(raw), ()):
                shape, dtype_name = known[key]
                dtype = getattr(torch, dtype_name)
                by_expert = layer is not None and bool(shape) and shape[0] == layer.num_experts
                target = layer if by_expert else None
                span = self.span(raw)
                in_shards = span is not None and math.prod(shape) > 1
                if in_shards or (hasattr(parameter, "device_mesh") and len(shape) > 0):
                    if parts_of(parameter, layer, span)[0].shape != shape:
                        raise NotImplementedError(
                            f"{self.op}: optimizer state of sharded parameters must have their shape, got {key} "
                            f"{list(shape)}. Load it without fully_shard, into whole experts."
                        )
                    tensor = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
                else:
                    local = (layer.num_local, *shape[1:]) if layer and by_expert else shape
                    # Step counts stay on the host, unless the optimizer moves them.
                    device = parameter.device if shape else "cpu"
                    tensor = torch.empty(local, dtype=dtype, device=device)
                room[key] = (parts_of(tensor, target, span if in_shards else None), tensor)
        return room


def parts_of(tensor: Tensor, layer: ExpertLayer | None, span: ShardSpan | None) -> list[Piece]:
    """A tensor as parts of the whole, at least one of them.

    Args:
        tensor: what this rank has.
        layer: whose experts dimension 0 counts, if it does.
        span: what of whole experts it is; ``None`` for all.
    """
    local, shape = tensor.detach(), list(tensor.shape)
    offset = [0] * tensor.dim()
    if hasattr(tensor, "device_mesh"):
        sharded: Any = tensor
        chunk = sharded.__create_chunk_list__()[0]
        local = sharded.to_local().detach()
        offset = list(chunk.offsets)
    if layer is not None:
        offset[0] += layer.rank * layer.num_local
        shape[0] *= layer.size
    if span is None:
        return [Piece(local, tuple(offset), tuple(shape))]
    dim, shape[span.dim], _ = span
    first, last = offset[dim], offset[dim] + local.shape[dim]  # FSDP2 may have cut the shard again
    pieces, before = [], 0
    for start, length in span.ranges:
        low, high = max(first, before), min(last, before + length)
        if low < high:
            offset[dim] = start + low - before
            part = local.narrow(dim, low - first, high - low)
            pieces.append(Piece(part, tuple(offset), tuple(shape)))
        before += length
    return pieces or [Piece(local.narrow(dim, 0, 0), tuple(offset), tuple(shape))]


def _expert_layers(op: str, model: nn.Module) -> Iterator[ExpertLayer]:
    """The model's layers of experts, the outer ones first."""
    for name, module in named_layers(model):
        if not hasattr(module, "experts"):
            continue
        prefix = f"{name}.experts." if name else "experts."
        group, names = module.moe_ranks, None
        if module.experts_fused:
            experts = module.experts
            experts = getattr(experts, "_orig_mod", experts)
            tensors = {clean_name(name): tensor for name, tensor in experts.state_dict().items()}
            names = tuple(
                n for n, t in tensors.items() if has_experts(experts, n, t, module.num_expert)
            )
        num_shards = module.expert_tensor_parallel_size
        yield ExpertLayer(
            prefix,
            module.num_expert,
            0 if group is None else group.rank // num_shards,
            1 if group is None else group.size // num_shards,
            names,
            _spans(op, prefix, experts, names) if num_shards > 1 else None,
        )


def _spans(op: str, prefix: str, experts: nn.Module, names: Any) -> dict[str, ShardSpan]:
    """What of whole experts the tensors of a shard are."""
    if not isinstance(experts, FusedExperts):
        raise NotImplementedError(
            f"{op}: experts in shards must be moeops.layers.FusedExperts, got {type(experts).__name__} as "
            f"{prefix.rstrip('.')}. Nobody knows what of whole experts its tensors are."
        )
    tensors = {clean_name(name): tensor for name, tensor in experts.state_dict().items()}
    spans = {}
    for name in names:
        weight = experts.weight_of(name)
        assert weight is not None
        shape = getattr(experts, weight).shape
        if tensors[name].shape != shape:
            raise NotImplementedError(
                f"{op}: what adapts experts in shards must have the shape of the weight {weight}, {list(shape)}, got "
                f"{prefix}{name} {list(tensors[name].shape)}: each shard has one of its own. Merge the adapter into "
                "the weight first, or hold whole experts."
            )
        spans[name] = experts.shard_span(weight)
    return spans
