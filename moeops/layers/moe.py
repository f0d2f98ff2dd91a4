"""Mixture of experts around any gate and any expert. T tokens, K experts per token, N = T * K pairs, E experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moeops import _checks, _nests
from moeops.comm.agreement import agreement
from moeops.comm.groups import moe_group_of, process_group, slice_group_of
from moeops.comm.hierarchical import Hierarchy
from moeops.comm.slicing import SLICE_GRADIENTS, join_tokens, slice_tokens
from moeops.dispatch.base import Dispatcher, DispatchOptions, ExpertRanks
from moeops.dispatch.options import as_options, build_dispatcher, choose_degrees, connect
from moeops.dispatch.switching import build_switches
from moeops.gates.injected_loss import with_gate_losses
from moeops.gates.naive import NaiveGate
from moeops.layers import _layer_checks
from moeops.layers._build import (
    EXPERT_CALLS,
    build_expert,
    build_gate,
    placed,
    set_expert_shards,
)
from moeops.layers._dispatches import Dispatches
from moeops.layers._moved_options import refuse_moved_options
from moeops.layers._routings import (
    as_routing,
    fill_masked,
    hide_tokens,
    output_weights,
    without_masked,
)
from moeops.layers._state import hold_experts, take_experts
from moeops.layers._tags import TagsParameters, restore_tags
from moeops.layers.shared import SharedPart, build_shared, shared_structure
from moeops.types import Routing, SlotRouting

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

GateHook = Callable[[Tensor, Tensor, None], Any]
# hook(layer, what the gate got, routing): what it returns replaces the routing, unless it is None. One with a true
# attribute takes_mask is called with mask=[T] as well, if there is a mask.
RoutingHook = Callable[..., Routing | SlotRouting | None]


class FMoE(Dispatches, TagsParameters):
    """Send each token to a few of several experts and sum their outputs, weighted by a gate.

    FastMoE's layer of the same name, with its argument names and order. An expert may be any module, the experts may
    differ, and inputs and outputs may be nests (dict, list, tuple) of tensors with the tokens in dimension 0.

    Departures from FastMoE:

    - ``gate`` may also be a factory function or a ready module; an expert may also be a ready module.
    - An expert is called with its rows, and with the row count too (as FastMoE 1.x calls all) if it asks for two
      arguments.
    - An expert without tokens is called with zero rows, so its parameters get zero gradients and every rank of a
      data-parallel job reduces the same set (FastMoE's smart schedule skips it, and gives it none). Experts must
      accept zero rows.
    - A mask without ``mask_dict`` is not ignored: the tokens it names come out as zeros.
    - Masked tokens take no capacity and count in no loss; FastMoE's gates do not know of the mask.
    - For nested inputs the gate sees the first leaf, unless it has a true attribute ``nested_input``; FastMoE hands
      every gate the whole nest.
    - Any number of layers with any expert groups may live in a process, and a slice group cuts off no remainder.
    - An argument that differs between the ranks of ``moe_group`` is an error on all of them.

    Args:
        num_expert: experts on each rank, ``E / world_size``; with a list of experts, its length counts instead.
        d_model: width ``D`` that gate and experts are built for.
        world_size: ranks ``W`` that share the experts. Rank ``r`` of ``moe_group`` holds the experts ``r *
            num_expert`` to ``(r + 1) * num_expert``; the gate chooses among all ``E``.
        mp_group: FastMoE's old name of ``slice_group``.
        slice_group: ranks that hold the same tokens: each works on its slice, and the outputs are joined. See
            ``moeops.comm.slicing`` for the gradients.
        moe_group: the ``W`` ranks; ``None`` means the whole job where ``world_size`` is above 1.
        top_k: experts per token ``K`` that the gate is built for.
        gate: class or function called as ``gate(d_model, num_expert, world_size, top_k)``, with ``gate_bias=`` if it
            takes that, or a ready module. It returns ``(topk_ids, topk_weights)``, a ``moeops.Routing`` or a
            ``moeops.SlotRouting``.
        expert: class or function called with ``d_model`` to build each expert; or a list with one class, function or
            ready module per expert; or ``None`` in a subclass that sets ``self.experts`` to one module, which is then
            called as ``experts(rows, tokens_per_expert)`` with rows in expert order. Rows of dropped pairs come last,
            and may be left out of what that module returns.
        gate_hook: called as ``gate_hook(topk_ids, topk_weights, None)`` after the gate; what it returns is ignored.
            With a SlotRouting, as ``gate_hook(dispatch_weights, combine_weights, None)``.
        mask: integers, one per token; see ``forward``. Kept as a buffer that is not saved.
        mask_dict: mask value to expert output of the tokens so masked: a number, or a tensor of one output row.
        gate_bias: handed to the gate if its constructor takes it; ``None`` for the gate's own default, which is True in
            all but ``ReMoEGate``.
        device_mesh: a mesh of one dimension that holds the experts, instead of ``moe_group``; ``world_size`` may then
            be left out.
        dispatch: how tokens get to other ranks: a record with its options, or a name for its defaults.
            ``moeops.distributed.Exact``, "exact", sends as many rows as there are, and copies some counts to the host;
            ``moeops.distributed.Gather``, "gather", brings all tokens to all ranks, which must have equally many, and
            copies nothing; ``moeops.distributed.Static``, "static", sends buffers of fixed size, drops what does not
            fit, and copies nothing; ``moeops.distributed.Auto``, "auto", chooses one of the first two. With one rank
            "static" drops the same, and the others send nothing.
        expert_tensor_parallel_size: neighbouring ranks ``P`` of ``moe_group`` that hold the same experts, each a shard
            of them whose outputs add up; ``E`` is then ``num_expert * W / P``. For subclasses that set
            ``self.experts``, such as ``FMoETransformerMLP``; 1 where ``expert`` is given.
        expert_call: "rows" to call each of several experts with its rows, "rows,count" to add how many these are, an
            int64 tensor ``[1]`` on the CPU; ``None`` asks each expert's signature: "rows,count" for one whose
            ``forward`` has two positional parameters without a default.
        slice_gradients: with a ``slice_group``, "mean" for gradients of gate and experts that are right after they
            are averaged over its ranks, like all others; "fastmoe" for those of this rank's slice alone, which are
            right after they are summed.
        parallel_degrees: what ``forward(parallel=r)`` may choose beside ``W``: in how many neighbouring ranks tokens
            travel to experts, whose weights come from the other ranks. 1 for data parallelism, and for a divisor ``r``
            of ``W`` in between ``moeops.distributed.build_hierarchy(moe_group, r)``. Experts as for ``replicas``.
        shared_expert: one more expert, for every token, whose work runs while tokens travel: a class or function called
            with ``d_model``, or a ready module, called as ``shared_expert(moe_inp)``, which it must not write into;
            returns what the experts return. In ``FMoETransformerMLP`` also a hidden width.
        shared_expert_gate: how it is added: ``None`` as it is, as in DeepSeek's models; "sigmoid" times a learned
            factor per token, as in Qwen2-MoE; "softmax" for PR-MoE's residual experts, with a learned pair of factors
            per token that add up to 1, the first on the sum of the chosen experts.
        dtype: type of the parameters built here, torch's default if ``None``. Ready modules stay as they are.
        device: device of the parameters built here, torch's default if ``None``.

    Attributes:
        routing_hooks: tuple of functions ``hook(layer, x, routing)`` that are called after the gate, with what the gate
            got and a routing in which masked tokens have no experts; what one returns replaces the routing, unless it
            is ``None``. A hook with a true attribute ``takes_mask`` gets ``mask=`` too, if there is one.
            ``LoadMonitor`` and ``RoutingReplay`` are made of them.
        moe_ranks, slice_ranks: the groups as ``moeops.distributed.RankGroup``, ``None`` for this rank alone.
        moe_group, slice_group: the same as process groups of torch.distributed.
        shared_expert: the module, or ``None``.
        shared_expert_gate: a ``SharedExpertGate`` with the parameters of ``nn.Linear(d_model, 1, bias=False)`` for
            "sigmoid", ``nn.Linear(d_model, 2)`` for "softmax"; or ``None``.

    Raises:
        ValueError: a size or an option does not fit.  TypeError: an argument has the wrong type.
        RuntimeError: building the layer failed on another rank.
    Host sync: one copy of a few integers per rank and expert per forward, to cut the rows into one slice per expert
    (under ``torch.compile`` on CUDA too); for ``dispatch="static"`` none while the number of tokens stays.
    ``FMoETransformerMLP`` has none for "gather" or with one rank either, and one for "exact" with more.

    Example:
        >>> layer = FMoE(4, 8, top_k=2, expert=lambda d_model: nn.Linear(d_model, 3))
        >>> layer(torch.randn(5, 8)).shape
        torch.Size([5, 3])
    """

    mask: Tensor | None

    @refuse_moved_options
    def __init__(
        self,
        num_expert: int = 32,
        d_model: int = 1024,
        world_size: int = 1,
        mp_group: Any = None,
        slice_group: Any = None,
        moe_group: Any = None,
        top_k: int = 2,
        gate: Callable[..., nn.Module] | nn.Module = NaiveGate,
        expert: Callable[[int], nn.Module] | Sequence[Any] | nn.ModuleList | None = None,
        gate_hook: GateHook | None = None,
        mask: Tensor | None = None,
        mask_dict: dict[int, Any] | None = None,
        gate_bias: bool | None = None,
        *,
        device_mesh: DeviceMesh | None = None,
        dispatch: str | DispatchOptions = "auto",
        expert_tensor_parallel_size: int = 1,
        expert_call: str | None = None,
        slice_gradients: str = "mean",
        parallel_degrees: Sequence[int | Hierarchy] = (),
        shared_expert: Any = None,
        shared_expert_gate: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        self.moe_ranks = moe_group_of(op, world_size, moe_group, device_mesh)
        self.slice_ranks = slice_group_of(op, mp_group, slice_group)
        self.world_size = 1 if self.moe_ranks is None else self.moe_ranks.size
        settings: dict[str, Any] = {"layer": op}
        with agreement(op, self.moe_ranks, settings, device):
            _layer_checks.check_choice(op, "slice_gradients", slice_gradients, SLICE_GRADIENTS)
            self.slice_gradients = slice_gradients
            if expert_call is not None:
                _layer_checks.check_choice(op, "expert_call", expert_call, EXPERT_CALLS)
            self.expert_call = expert_call
            _layer_checks.check_shards(op, expert_tensor_parallel_size, self.world_size, expert)
            self.expert_tensor_parallel_size = expert_tensor_parallel_size
            self._build(
                num_expert, d_model, top_k, gate, expert, gate_bias, dtype=dtype, device=device
            )
            self.shared_expert, self.shared_expert_gate = build_shared(
                op, shared_expert, shared_expert_gate, d_model, dtype, device
            )
            ranks = ExpertRanks(
                op, self.num_expert, self.moe_ranks, expert_tensor_parallel_size, self.top_k
            )
            record = as_options(op, dispatch)
            self.dispatcher: Dispatcher = build_dispatcher(record, ranks)
            options, why = record.choose(ranks)
            self._switches = build_switches(record, ranks, parallel_degrees)
            structure, table = None, self.dispatcher.table()
            for option in self._sharing_options():
                structure = self._check_sharing(option)
            _layer_checks.check_mask(op, mask, None)
            self.mask_dict = _layer_checks.check_mask_dict(op, mask_dict)
            settings.update(
                num_expert=self.num_expert,
                d_model=d_model,
                top_k=self.top_k,
                gate=type(self.gate).__name__,
                **options.settings(ranks),
                expert_tensor_parallel_size=expert_tensor_parallel_size,
                experts=structure,
                shared_expert=shared_structure(self.shared_expert),
                shared_expert_gate=shared_expert_gate,
                dtype=str(dtype),
                parallel_degrees=tuple(self._switches),
                slices=1 if self.slice_ranks is None else self.slice_ranks.size,
                slice_gradients=slice_gradients,
            )
        for dispatcher in (self.dispatcher, *(one.inner for one in self._switches.values())):
            connect(dispatcher)
            choose_degrees(dispatcher, device)
        if options.auto_chunks(op) is not None:
            why = f"n_chunks {self.dispatcher.degrees}"
        self.dispatch_text = f"{options} ({why})" if why else str(options)
        self.gate_hook = gate_hook
        self._hold(mask, None if table is None else table.to(device))

    def _hold(self, mask: Tensor | None, table: Tensor | None) -> None:
        """Keep buffers, and have state dicts and tags hold what is more than a tensor."""
        # A plain attribute: a compiler sees it change, which it does not with torch's hooks on the gate.
        self.routing_hooks: tuple[RoutingHook, ...] = ()
        self.register_buffer("mask", mask, persistent=False)
        self._first_mask = None if mask is None else mask.detach().cpu()
        self.register_buffer("dispatch_table", table, persistent=False)
        self.expert_dp_comm: str | None = None
        self.dtensor_state = False
        self.register_state_dict_post_hook(hold_experts)
        self.register_load_state_dict_pre_hook(take_experts)
        self.register_load_state_dict_post_hook(restore_tags)

    def _build(
        self,
        num_expert: int,
        d_model: int,
        top_k: int,
        gate: Any,
        expert: Any,
        gate_bias: bool | None,
        *,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> None:
        """Make the gate and the experts."""
        op = type(self).__name__
        is_list = isinstance(expert, (list, tuple, nn.ModuleList))
        if is_list:
            num_expert = len(expert)
        for name, size in (("num_expert", num_expert), ("d_model", d_model)):
            _checks.check_int(op, name, size, 1, "Sizes are at least 1.")
        self.num_expert = num_expert
        self.d_model = d_model
        expert_ranks = self.world_size // self.expert_tensor_parallel_size
        with placed(device):
            self.gate = build_gate(op, gate, d_model, num_expert, expert_ranks, top_k, gate_bias)
        if dtype is not None and self.gate is not gate:
            self.gate.to(dtype)
        if self.moe_ranks is not None and getattr(self.gate, "group", self) is None:
            self.gate.group = self.moe_ranks  # type: ignore[assignment]  # a BaseGate
        set_expert_shards(self.gate, self.expert_tensor_parallel_size)
        self.top_k = getattr(self.gate, "top_k", top_k)
        self.experts_fused = expert is None
        if expert is not None:
            plans = list(expert) if is_list else [expert] * num_expert
            with placed(device):
                built = [build_expert(op, plan, d_model, is_list) for plan in plans]
            if dtype is not None:
                for plan, module in zip(plans, built, strict=True):
                    if module is not plan:
                        module.to(dtype)
            self.experts = nn.ModuleList(built)
            self._counted = tuple(self._takes_count(module) for module in built)

    @property
    def moe_group(self) -> ProcessGroup | None:
        """The process group that holds the experts; ``None`` where this rank holds all of them."""
        return None if self.moe_ranks is None else process_group(self.moe_ranks.name)

    @property
    def slice_group(self) -> ProcessGroup | None:
        """The process group that holds the same tokens; ``None`` for this rank alone."""
        return None if self.slice_ranks is None else process_group(self.slice_ranks.name)

    @property
    def tot_expert(self) -> int:
        """``E``, the experts on all ranks together."""
        return self.num_expert * (self.world_size // self.expert_tensor_parallel_size)

    def reset_parameters(self) -> None:
        """Draw new parameters and start buffers anew, in the gate and in every expert that can, and in the layer.

        After ``to_empty`` of a layer that was built on the meta device nothing is left undefined.
        """
        # Inner modules first: a gate may start its router in its own way.
        for module in reversed(list(self.modules())):
            if module is not self and callable(getattr(module, "reset_parameters", None)):
                module.reset_parameters()  # type: ignore[operator]  # callable, as asked
        if self.mask is not None and self._first_mask is not None:
            self.mask = self._first_mask.to(self.mask.device)

    def forward(
        self, moe_inp: Any, mask: Tensor | None = None, *, parallel: int | None = None
    ) -> Any:
        """Run tokens through the gate and their experts.

        Args:
            moe_inp: tokens, ``[T, D]``, or a nest of tensors with ``T`` entries each in dimension 0. The gate sees the
                first leaf (a dict's first key), flattened to ``[T, D]``; one with a true attribute ``nested_input``
                gets ``moe_inp`` as it is.
            mask: ``T`` numbers in any shape, on any device; tokens with a value other than 0 skip the gate and the
                experts: they take no capacity and count in no loss, load or bias, and what they hold, NaN too, reaches
                nobody. Their output is 0, or where ``mask_dict`` has their value ``mask_dict[value]`` times the sum of
                the weights that the gate gives to their choices, before anything would be dropped. With ``mask_dict``
                a masked token whose numbers are all finite therefore goes through the router, and gets a gradient from
                there. Overrides the constructor's mask for this call. With a SlotRouting the other tokens of the group
                take over a masked token's share of each slot.
            parallel: ``r``, ``W`` or one of ``parallel_degrees``, the same on all ranks; ``None`` for ``W``. Results
                are those of any other, but for roundings.

        Returns:
            What the experts return, with ``T`` entries in dimension 0 of each leaf: the sum over a token's experts,
            weighted. A dropped pair adds nothing. With ``scale_inputs`` the weights multiply the first leaf of the
            input instead.

        Raises:
            ValueError: a shape does not fit.  TypeError: a leaf is not a tensor, the gate's input is not float, or the
            gate returns other types than it must.
        """
        op = type(self).__name__
        moe_inp = self.stage_hooks.call("before_moe_start", moe_inp)
        leaves = _nests.leaves(moe_inp)
        if not torch.compiler.is_compiling():
            _layer_checks.check_leaves(op, leaves)
            if not self._gate_reads_nest():
                _layer_checks.check_gate_input(op, leaves[0])
        mask = self._mask_of(mask)
        if mask is not None:
            if not torch.compiler.is_compiling():
                _layer_checks.check_mask(op, mask, leaves[0])
            mask = mask.reshape(-1).to(leaves[0].device)  # [T]
            torch._check(mask.shape[0] == leaves[0].shape[0])
            moe_inp = hide_tokens(moe_inp, mask, finite=self.mask_dict is None)
        group = self.slice_ranks
        if group is None:
            out = self._forward(moe_inp, mask, parallel)
        else:
            mean = self.slice_gradients == "mean"
            inp = slice_tokens(moe_inp, group, mean=mean)
            mask = mask if mask is None else slice_tokens(mask, group)
            out = join_tokens(
                self._forward(inp, mask, parallel), leaves[0].shape[0], group, mean=mean
            )
        return self.stage_hooks.call("before_moe_end", out)

    def _mask_of(self, mask: Tensor | None) -> Tensor | None:
        """The mask of a call: the given one, or the constructor's."""
        return self.mask if mask is None else mask

    def _gate_reads_nest(self) -> bool:
        """The gate gets what the layer gets, and not the first leaf."""
        return bool(getattr(self.gate, "nested_input", False))

    def _forward(self, moe_inp: Any, mask: Tensor | None, parallel: int | None) -> Any:
        """Run checked tokens, those of one slice."""
        op = type(self).__name__
        first = _nests.leaves(moe_inp)[0]
        gate_inp = moe_inp
        if not self._gate_reads_nest():
            gate_inp = first if first.dim() == 2 else first.flatten(1)  # [T, D]
            if not torch.compiler.is_compiling():
                _checks.check_float(op, "moe_inp", gate_inp)
                _checks.check_size(op, "moe_inp", gate_inp, 1, self.d_model, "d_model")
        # Before the gate: weights or tokens may be on their way while it works.
        dispatcher = self._dispatcher_of(parallel)
        early = dispatcher.start(moe_inp, self._expert_weights, self.dispatch_table)
        takes_mask = mask is not None and getattr(self.gate, "takes_mask", False)
        options = {"mask": mask} if takes_mask else {}
        routing = every = as_routing(op, self.gate, self.gate(gate_inp, **options))
        if not torch.compiler.is_compiling():
            _layer_checks.check_routing(op, self.gate, routing, first, self.tot_expert)
        if mask is not None:
            routing = without_masked(routing, mask)
        for hook in self.routing_hooks:
            takes_mask = mask is not None and getattr(hook, "takes_mask", False)
            replaced = hook(self, gate_inp, routing, **({"mask": mask} if takes_mask else {}))
            if replaced is not None:
                every = replaced
                routing = replaced if mask is None else without_masked(replaced, mask)
        if self.gate_hook is not None:
            self.gate_hook(routing[0], routing[1], None)
        shared = None
        if self.shared_expert is not None:
            shared = SharedPart(op, self.shared_expert, self.shared_expert_gate, moe_inp, mask)
            early = {**early, "beside": shared}
        out = self._mixture(dispatcher, routing, moe_inp, early)
        if shared is not None:
            out = shared.add_to(out)
        if mask is not None:
            out = fill_masked(out, mask, self.mask_dict, output_weights(every))
        return with_gate_losses(self.gate, out)

    def extra_repr(self) -> str:
        """Sizes of the layer."""
        text = f"num_expert={self.num_expert}, d_model={self.d_model}, top_k={self.top_k}"
        if self.expert_tensor_parallel_size > 1:
            text += f", expert_tensor_parallel_size={self.expert_tensor_parallel_size}"
        if self.moe_ranks is not None:
            text += f", dispatch={self.dispatch_text}"
        if self._switches:
            text += f", parallel_degrees={tuple(sorted(self._switches))}"
        return text
