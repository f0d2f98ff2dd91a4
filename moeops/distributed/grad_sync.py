"""Gradients of parameters that live on different groups of ranks: average and scale."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moeops import _checks
from moeops.comm.averaging import average_gradient
from moeops.comm.groups import RankGroup, rank_group, timeout_of
from moeops.comm.wires import explained
from moeops.layers.walk import named_layers, parameter_tags

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Work

_DEFAULT_TAGS = ("dp", "gate", "moe", "world")


def scale_expert_gradients(model: nn.Module) -> list[RemovableHandle]:
    """Make the gradients of experts that are spread over ranks those of the ranks' mean loss, as all others are.

    The tokens of all ``W`` ranks of a layer's ``moe_group`` reach its experts, so their gradients are those of the sum
    of the ranks' losses, ``W`` times those that one rank would compute for the mean. From this call on every gradient
    is divided by ``W`` as it arrives, before it is added to ``grad``. ``DistributedGroupedDataParallel`` does this by
    itself; call it once, before the first step, where DDP or FSDP2 is used instead. FSDP2 must have been given the
    experts before, by a ``fully_shard`` of their own.

    Parameters that torch makes anew later, as ``load_state_dict(assign=True)`` does, have no hook: remove the hooks and
    call it again. ``DistributedGroupedDataParallel`` sees to that by itself.

    Args:
        model: holds ``moeops.FMoE`` layers.

    Returns:
        The hooks; ``remove()`` ends it. None for experts of FSDP2, which divides by itself.

    Raises:
        ValueError: the experts are sharded together with other modules.
    """
    return [hook.handle for hook in _hook_scales(model).values()]


class _Hook(NamedTuple):
    """A hook on a parameter, and the tensor it is on: ``torch.utils.swap_tensors`` puts another one in its place."""

    handle: RemovableHandle
    tensor: int

    def is_on(self, parameter: nn.Parameter) -> bool:
        """Whether gradients of the parameter call the hook."""
        return parameter._cdata == self.tensor


def _hook_scales(model: nn.Module) -> dict[nn.Parameter, _Hook]:
    """Have experts' gradients divided as they arrive."""
    hooks = {}
    for parameter, (name, ranks) in _served_ranks(model).items():
        if hasattr(parameter, "device_mesh"):
            raise ValueError(
                f"scale_expert_gradients: experts must be sharded by themselves, got {name} sharded with other "
                "parameters. Call fully_shard(layer.experts, mesh=...) before fully_shard of the whole."
            )
        parameter._backward_hooks = (
            parameter._backward_hooks
        )  # a swap leaves the dict, and nobody who reads it
        handle = parameter.register_hook(lambda grad, f=1.0 / ranks: grad * f)
        hooks[parameter] = _Hook(handle, parameter._cdata)
    for _, layer in named_layers(model):
        if layer.moe_ranks is not None:
            for module, parameters in _fully_sharded(layer.experts):
                sharded: Any = parameters[0]
                mesh = sharded.device_mesh
                module.set_gradient_divide_factor(float(layer.moe_ranks.size * mesh.size()))
    return hooks


def _served_ranks(model: nn.Module) -> dict[nn.Parameter, tuple[str, int]]:
    """Experts' parameters whose gradients need a hook, with their names and how many ranks' losses reach them."""
    served = {}
    for _, layer in named_layers(model):
        if layer.moe_ranks is None:
            continue
        by_itself = {p for _, parameters in _fully_sharded(layer.experts) for p in parameters}
        for name, parameter in layer.experts.named_parameters():
            if parameter.requires_grad and parameter not in by_itself:
                served[parameter] = name, layer.moe_ranks.size
    return served


def _fully_sharded(experts: nn.Module) -> Iterator[tuple[Any, list[nn.Parameter]]]:
    """Modules that FSDP2 has sharded, with their parameters: it divides their gradients by itself."""
    from torch.distributed.fsdp import FSDPModule

    for module in experts.modules():
        if isinstance(module, FSDPModule) and (parameters := list(module.parameters())):
            yield module, parameters


class _Bucket(NamedTuple):
    """Parameters that are reduced in one go: one group, one type, one device."""

    group: ProcessGroup
    parameters: list[nn.Parameter]


class _Pending(NamedTuple):
    """A reduction under way."""

    bucket: _Bucket
    flat: Tensor
    work: Work
    divide_by: int


class DistributedGroupedDataParallel(nn.Module):
    """Average each parameter's gradient over the ranks that hold a copy of the parameter.

    FastMoE's wrapper of the same name. A parameter belongs to the group that its tag names: the attribute ``dp_comm``,
    "dp" without one. The layers of this library tag experts "none" and gates "gate"; any other string will do, with a
    keyword ``<tag>_group`` here. A tag without a group is not reduced. Layers know the tags of their parameters, so
    those that torch makes anew keep theirs: see ``FMoE.mark_parallel_comm``.

    Tags and parameters are read when gradients are reduced. With ``auto_allreduce`` they are read when the wrapper is
    built and when it is called: a change between that and the backward is an error.

    Gradients are averaged by ``allreduce_gradients`` after the backward, or, with ``auto_allreduce``, in buckets
    during the backward. A parameter without a gradient on this rank counts as zeros and gets the average too, so the
    ranks may differ in what they use.

    With ``in_graph`` the averages are ops of the backward itself, eager or compiled, one for each parameter, where its
    gradient arises: ``moeops.compile`` puts those of compiled code into slices that run beside experts. Nothing is left
    for ``allreduce_gradients`` then, which may still be called. All ranks must use the same parameters in a forward,
    and activation checkpointing must have ``use_reentrant=False``, or gradients of what it wraps are not averaged.

    Departures from FastMoE:

    - ``auto_allreduce=True`` and ``in_graph=True`` are there.
    - Experts spread over ``W`` ranks have their gradients divided by ``W``: see ``scale_expert_gradients``. N ranks
      then train what one rank trains. ``scale_experts=False`` leaves them as FastMoE does.
    - Parameters without a gradient do not make the ranks disagree.

    Args:
        module: what to train.
        auto_allreduce: reduce during the backward, overlapped with it. Every rank must run a backward through at
            least one parameter in every step.
        need_sync: start by giving all ranks of a group the parameters of its first rank.
        scale_experts: divide the experts' gradients by the ranks that they serve.
        bucket_bytes: size of a bucket in bytes.
        fp32_allreduce: with ``auto_allreduce`` or ``in_graph``, reduce in float32 whatever the gradients are.
        in_graph: average where gradients arise, by ops of the backward; not with ``auto_allreduce``.
        **groups: ``<tag>_group``: a process group, or ``None`` for a tag that is not reduced. ``dp_group``,
            ``gate_group``, ``moe_group`` and ``world_group`` are all ranks where they are not given.

    Attributes:
        module: the module.
        averaged_in_graph: with ``in_graph``, the ranks that average each parameter's gradient, by its name in
            ``module``; else empty.

    Raises:
        TypeError: a keyword is no ``<tag>_group``, or its value no group.  ValueError: both ``auto_allreduce`` and
        ``in_graph``.  RuntimeError: torch.distributed is not initialised; when gradients are reduced, parameters were
        replaced after the last call of the wrapper.

    Example (under torchrun)::

        model = DistributedGroupedDataParallel(model)
        loss_of(model(x)).backward()
        model.allreduce_gradients()
        optimizer.step()
    """

    def __init__(
        self,
        module: nn.Module,
        auto_allreduce: bool = False,
        need_sync: bool = True,
        *,
        scale_experts: bool = True,
        bucket_bytes: int = 25 * 2**20,
        fp32_allreduce: bool = False,
        in_graph: bool = False,
        **groups: ProcessGroup | None,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        dist = torch.distributed
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                f"{op}: torch.distributed must be initialised, got no default group. Call "
                "torch.distributed.init_process_group first."
            )
        _checks.check_int(op, "bucket_bytes", bucket_bytes, 1, "Use 25 * 2**20.")
        if in_graph and auto_allreduce:
            raise ValueError(
                f"{op}: in_graph must be False where auto_allreduce is True, got both. Each reduces by itself: pass "
                "one of them."
            )
        self.module = module
        self.fp32_allreduce = fp32_allreduce
        self._groups = _read_groups(op, groups)
        self._bucket_bytes = bucket_bytes
        self._sync = True
        self._scale_experts = scale_experts
        self._scale_hooks = _hook_scales(module) if scale_experts else {}
        if need_sync:
            self._broadcast_parameters()
        self.auto_allreduce = auto_allreduce
        self.in_graph = in_graph
        self._own_groups: dict[str, ProcessGroup] = {}
        self.averaged_in_graph: dict[str, RankGroup] = self._plan_in_graph() if in_graph else {}
        if auto_allreduce:
            self._reduce_hooks: dict[nn.Parameter, _Hook] = {}
            self._start_auto(self._plan())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        if not torch.compiler.is_compiling():
            self._follow()
        if not (self.in_graph and torch.is_grad_enabled()):
            return self.module(*args, **kwargs)
        averaged = {
            name: average_gradient(
                self.module.get_parameter(name), group, in_float32=self.fp32_allreduce
            )
            for name, group in self.averaged_in_graph.items()
        }
        return torch.func.functional_call(self.module, averaged, args, kwargs)

    def _plan_in_graph(self) -> dict[str, RankGroup]:
        """Groups of the parameters whose averages are ops of the backward, by name."""
        names = {parameter: name for name, parameter in self.module.named_parameters()}
        averaged = {}
        for group, parameters in self._plan():
            own = rank_group(self._own_group(group))
            assert own is not None
            averaged.update({names[parameter]: own for parameter in parameters})
        return averaged

    def _own_group(self, group: ProcessGroup) -> ProcessGroup:
        """A group of the same ranks for reductions alone, so that these and exchanges of layers can work at once."""
        if group.group_name not in self._own_groups:
            dist = torch.distributed
            ranks = rank_group(group)
            assert ranks is not None
            with _naming("DistributedGroupedDataParallel", group):
                own = dist.new_group(
                    dist.get_process_group_ranks(group),
                    timeout=timeout_of(ranks),
                    backend=dist.get_backend(group),
                    use_local_synchronization=True,
                )
            self._own_groups[group.group_name] = own
        return self._own_groups[group.group_name]

    def _plan(self) -> list[_Bucket]:
        """What is reduced, by the tags and parameters of this moment."""
        return _make_buckets(self.module, self._groups, self._bucket_bytes)

    def _follow(self) -> None:
        """Put hooks on parameters that are new, and those of the reduction where tags have changed."""
        if self._unscaled():
            for hook in self._scale_hooks.values():
                hook.handle.remove()
            self._scale_hooks = _hook_scales(self.module)
        if self.auto_allreduce and self._is_stale():
            for hook in self._reduce_hooks.values():
                hook.handle.remove()
            self._start_auto(self._plan())
        if self.in_graph:
            self.averaged_in_graph = self._plan_in_graph()

    def _unscaled(self) -> list[str]:
        """Names of experts' parameters without the hook that divides their gradients."""
        if not self._scale_experts:
            return []
        hooks = self._scale_hooks
        return [
            name
            for parameter, (name, _) in _served_ranks(self.module).items()
            if parameter not in hooks or not hooks[parameter].is_on(parameter)
        ]

    def _is_stale(self) -> bool:
        """The buckets of ``auto_allreduce`` are not those of this moment's parameters and tags."""
        if not all(hook.is_on(parameter) for parameter, hook in self._reduce_hooks.items()):
            return True
        return _layout(self._plan()) != self._layout

    def _refuse_changes(self, changed: bool) -> None:
        if changed:
            raise RuntimeError(
                "DistributedGroupedDataParallel: parameters and tags must be those of the last call of the wrapper, "
                "got others, whose gradients have no hooks. Call the wrapper itself, and change nothing between its "
                "call and the reduction."
            )

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Let gradients add up on each rank: backward passes in here reduce nothing, the next one reduces the sum.

        Raises:
            NotImplementedError: with ``in_graph``, where each backward averages what it adds.
        """
        if self.in_graph:
            raise NotImplementedError(
                "DistributedGroupedDataParallel: in_graph must be False for no_sync, got True. Leave no_sync out: "
                "every backward averages what it adds to grad."
            )
        before, self._sync = self._sync, False
        try:
            yield
        finally:
            self._sync = before

    @torch.no_grad()
    def allreduce_gradients(
        self, no_scale: bool = False, reduce_after: bool = False, fp32_allreduce: bool = False
    ) -> None:
        """Average the gradients, each over its group; with ``in_graph`` they are averaged already.

        Args:
            no_scale: sum instead.
            reduce_after: divide after the sum and not before it: more exact, and nearer to an overflow in float16.
            fp32_allreduce: reduce in float32.
        """
        self._refuse_changes(bool(self._unscaled()))
        if self.in_graph:
            self._refuse_changes(self.averaged_in_graph != self._plan_in_graph())
            return
        pending = [
            _begin(bucket, no_scale, reduce_after, fp32_allreduce) for bucket in self._plan()
        ]
        for reduction in pending:
            _end(reduction)

    # FastMoE's older name.
    allreduce_params = allreduce_gradients

    @torch.no_grad()
    def _broadcast_parameters(self) -> None:
        dist = torch.distributed
        for group, parameters in self._plan():
            flat = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
            with _naming("DistributedGroupedDataParallel", group):
                dist.broadcast(flat, dist.get_global_rank(group, 0), group=group)
            _copy_back(flat, [parameter.detach() for parameter in parameters])

    def _start_auto(self, plan: list[_Bucket]) -> None:
        # Groups of their own, because the order of these reductions among a layer's exchanges depends on the rank.
        self._layout = _layout(plan)
        self._buckets = [_Bucket(self._own_group(group), parameters) for group, parameters in plan]
        self._missing: list[int] = []
        self._next = 0
        self._pending: list[_Pending] = []
        self._running = False
        self._reduce_hooks = {}
        for index, bucket in enumerate(self._buckets):
            for parameter in bucket.parameters:
                hooks = parameter._post_accumulate_grad_hooks  # as for hooks that scale
                parameter._post_accumulate_grad_hooks = hooks
                handle = parameter.register_post_accumulate_grad_hook(
                    lambda _, index=index: self._on_gradient(index)
                )
                self._reduce_hooks[parameter] = _Hook(handle, parameter._cdata)

    def _on_gradient(self, index: int) -> None:
        """One more gradient of a bucket is there; begin whatever bucket is complete, in order."""
        if not self._sync:
            return
        if not self._running:
            self._refuse_changes(self._is_stale() or bool(self._unscaled()))
            self._running = True
            self._missing = [len(bucket.parameters) for bucket in self._buckets]
            self._next, self._pending = 0, []
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        self._missing[index] -= 1
        while self._next < len(self._buckets) and self._missing[self._next] <= 0:
            self._begin_next()

    @torch.no_grad()
    def _begin_next(self) -> None:
        bucket = self._buckets[self._next]
        self._pending.append(_begin(bucket, False, False, self.fp32_allreduce))
        self._next += 1

    @torch.no_grad()
    def _finish(self) -> None:
        """The backward is over: begin the buckets that lack gradients here, and wait for all."""
        self._running = False
        while self._next < len(self._buckets):
            self._begin_next()
        pending, self._pending = self._pending, []
        for reduction in pending:
            _end(reduction)


def _read_groups(op: str, groups: dict[str, Any]) -> dict[str, ProcessGroup]:
    """Tag to group, for the tags that are reduced."""
    dist = torch.distributed
    by_tag: dict[str, ProcessGroup | None] = dict.fromkeys(_DEFAULT_TAGS, dist.group.WORLD)
    for name, group in groups.items():
        if not name.endswith("_group") or name == "_group":
            raise TypeError(
                f"{op}: keywords must be named <tag>_group, got {name!r}. Pass for example moe_group=."
            )
        if group is not None and not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f"{op}: {name} must be a process group that holds this rank or None, got {_checks.describe(group)}. "
                "Pass what new_group or DeviceMesh.get_group returned."
            )
        by_tag[name.removesuffix("_group")] = group
    return {tag: group for tag, group in by_tag.items() if group is not None}


def _make_buckets(
    module: nn.Module, groups: dict[str, ProcessGroup], bucket_bytes: int
) -> list[_Bucket]:
    """Cut the parameters that are reduced into buckets, in the order in which a backward finishes them."""
    buckets: list[_Bucket] = []
    open_buckets: dict[Any, tuple[_Bucket, int]] = {}
    tags = parameter_tags(module)
    for parameter in reversed(list(module.parameters())):
        group = groups.get(tags.get(parameter, "dp"))
        if group is None or group.size() == 1 or not parameter.requires_grad:
            continue
        key = (group.group_name, parameter.dtype, parameter.device)
        size = parameter.numel() * parameter.element_size()
        bucket, used = open_buckets.get(key, (None, 0))
        if bucket is None or used + size > bucket_bytes:
            bucket, used = _Bucket(group, []), 0
            buckets.append(bucket)
        bucket.parameters.append(parameter)
        open_buckets[key] = bucket, used + size
    return buckets


def _layout(plan: list[_Bucket]) -> list[tuple[Any, ...]]:
    """What two plans for the same gradients have in common."""
    return [(bucket.group.group_name, *map(id, bucket.parameters)) for bucket in plan]


def _begin(bucket: _Bucket, no_scale: bool, reduce_after: bool, fp32: bool) -> _Pending:
    """Begin to reduce a bucket; a missing gradient counts as zeros and is there afterwards."""
    for parameter in bucket.parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        elif parameter.grad.is_sparse:
            raise TypeError(
                "DistributedGroupedDataParallel: gradients must be dense, got a sparse one of shape "
                f"{list(parameter.shape)}. Use sparse=False."
            )
    flat = torch.cat([grad.reshape(-1) for grad in _grads(bucket)])
    if fp32 and flat.dtype in (torch.float16, torch.bfloat16):
        flat = flat.float()
    size = 1 if no_scale else bucket.group.size()
    if size > 1 and not reduce_after:
        flat /= size
    with _naming("allreduce_gradients", bucket.group):
        work = torch.distributed.all_reduce(flat, group=bucket.group, async_op=True)
    return _Pending(bucket, flat, work, size if reduce_after else 1)


def _end(reduction: _Pending) -> None:
    """Wait for a reduction and write its result into the gradients."""
    with _naming("allreduce_gradients", reduction.bucket.group):
        reduction.work.wait()
    flat = reduction.flat
    if reduction.divide_by > 1:
        flat /= reduction.divide_by
    _copy_back(flat, _grads(reduction.bucket))


@contextlib.contextmanager
def _naming(op: str, group: ProcessGroup) -> Iterator[None]:
    """Errors of a collective say which op it was of, in which group, after which time-out."""
    try:
        yield
    except RuntimeError as err:
        raise explained(op, group.group_name, err) from err


def _grads(bucket: _Bucket) -> list[Tensor]:
    """The gradients of a bucket that has them all."""
    return [parameter.grad for parameter in bucket.parameters if parameter.grad is not None]


def _copy_back(flat: Tensor, tensors: list[Tensor]) -> None:
    parts = flat.split([tensor.numel() for tensor in tensors])
    views = [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
    torch._foreach_copy_(tensors, views)
