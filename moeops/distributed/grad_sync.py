"""Gradients of parameters that live on different groups of ranks: average, scale, clip."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moeops import _checks
from moeops.comm.groups import RankGroup
from moeops.layers.walk import named_layers

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

    Args:
        model: holds ``moeops.FMoE`` layers.

    Returns:
        The hooks; ``remove()`` ends it. None for experts of FSDP2, which divides by itself.

    Raises:
        ValueError: the experts are sharded together with other modules.
    """
    handles = []
    for _, layer in named_layers(model):
        if layer.moe_group is None:
            continue
        ranks = layer.moe_group.size
        sharded = _set_divide_factors(layer.experts, ranks)
        for name, parameter in layer.experts.named_parameters():
            if parameter in sharded or not parameter.requires_grad:
                continue
            if hasattr(parameter, "device_mesh"):
                raise ValueError(
                    f"scale_expert_gradients: experts must be sharded by themselves, got {name} sharded with other "
                    "parameters. Call fully_shard(layer.experts, mesh=...) before fully_shard of the whole."
                )
            handles.append(parameter.register_hook(lambda grad, f=1.0 / ranks: grad * f))
    return handles


def _set_divide_factors(experts: nn.Module, ranks: int) -> set[nn.Parameter]:
    """Have FSDP2 divide by all ranks whose losses reach the experts; return the parameters that it handles."""
    from torch.distributed.fsdp import FSDPModule

    handled: set[nn.Parameter] = set()
    for module in experts.modules():
        if isinstance(module, FSDPModule):
            parameters = list(module.parameters())
            handled.update(parameters)
            if parameters:
                mesh = parameters[0].device_mesh  # type: ignore[attr-defined]
                module.set_gradient_divide_factor(float(ranks * mesh.size()))
    return handled


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
    keyword ``<tag>_group`` here. A tag without a group is not reduced.

    Gradients are averaged by ``allreduce_gradients`` after the backward, or, with ``auto_allreduce``, in buckets
    during the backward. A parameter without a gradient on this rank counts as zeros and gets the average too, so the
    ranks may differ in what they use.

    Departures from FastMoE:

    - ``auto_allreduce=True`` is there.
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
        fp32_allreduce: with ``auto_allreduce``, reduce in float32 whatever the gradients are.
        **groups: ``<tag>_group``: a process group, or ``None`` for a tag that is not reduced. ``dp_group``,
            ``gate_group``, ``moe_group`` and ``world_group`` are all ranks where they are not given.

    Attributes:
        module: the module.

    Raises:
        TypeError: a keyword is no ``<tag>_group``, or its value no group.  RuntimeError: torch.distributed is not
        initialised.

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
        self.module = module
        self.fp32_allreduce = fp32_allreduce
        self._groups = _read_groups(op, groups)
        self._buckets = _make_buckets(module, self._groups, bucket_bytes)
        self._sync = True
        self._handles = scale_expert_gradients(module) if scale_experts else []
        if need_sync:
            self._broadcast_parameters()
        self.auto_allreduce = auto_allreduce
        if auto_allreduce:
            self._start_auto()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        return self.module(*args, **kwargs)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Let gradients add up on each rank: backward passes in here reduce nothing, the next one reduces the sum."""
        before, self._sync = self._sync, False
        try:
            yield
        finally:
            self._sync = before

    @torch.no_grad()
    def allreduce_gradients(
        self, no_scale: bool = False, reduce_after: bool = False, fp32_allreduce: bool = False
    ) -> None:
        """Average the gradients, each over its group.

        Args:
            no_scale: sum instead.
            reduce_after: divide after the sum and not before it: more exact, and nearer to an overflow in float16.
            fp32_allreduce: reduce in float32.
        """
        pending = [
            _begin(bucket, no_scale, reduce_after, fp32_allreduce) for bucket in self._buckets
        ]
        for reduction in pending:
            _end(reduction)

    # FastMoE's older name.
    allreduce_params = allreduce_gradients

    @torch.no_grad()
    def _broadcast_parameters(self) -> None:
        dist = torch.distributed
        for group, parameters in self._buckets:
            flat = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
            dist.broadcast(flat, dist.get_global_rank(group, 0), group=group)
            _copy_back(flat, [parameter.detach() for parameter in parameters])

    def _start_auto(self) -> None:
        # Groups of their own, because the order of these reductions among a layer's exchanges depends on the rank.
        dist = torch.distributed
        own: dict[str, ProcessGroup] = {}
        for index, (group, parameters) in enumerate(self._buckets):
            if group.group_name not in own:
                ranks = dist.get_process_group_ranks(group)
                own[group.group_name] = dist.new_group(ranks, use_local_synchronization=True)
            self._buckets[index] = _Bucket(own[group.group_name], parameters)
        self._missing: list[int] = []
        self._next = 0
        self._pending: list[_Pending] = []
        self._running = False
        for index, bucket in enumerate(self._buckets):
            for parameter in bucket.parameters:
                self._handles.append(
                    parameter.register_post_accumulate_grad_hook(
                        lambda _, index=index: self._on_gradient(index)
                    )
                )

    def _on_gradient(self, index: int) -> None:
        """One more gradient of a bucket is there; begin whatever bucket is complete, in order."""
        if not self._sync:
            return
        if not self._running:
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
    for parameter in reversed(list(module.parameters())):
        group = groups.get(getattr(parameter, "dp_comm", "dp"))
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
    work = torch.distributed.all_reduce(flat, group=bucket.group, async_op=True)
    return _Pending(bucket, flat, work, size if reduce_after else 1)


def _end(reduction: _Pending) -> None:
    """Wait for a reduction and write its result into the gradients."""
    reduction.work.wait()
    flat = reduction.flat
    if reduction.divide_by > 1:
        flat /= reduction.divide_by
    _copy_back(flat, _grads(reduction.bucket))


def _grads(bucket: _Bucket) -> list[Tensor]:
    """The gradients of a bucket that has them all."""
    return [parameter.grad for parameter in bucket.parameters if parameter.grad is not None]


def _copy_back(flat: Tensor, tensors: list[Tensor]) -> None:
    parts = flat.split([tensor.numel() for tensor in tensors])
    views = [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
    torch._foreach_copy_(tensors, views)


@torch.no_grad()
def clip_grad_norm_(
    model: nn.Module,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    *,
    foreach: bool | None = None,
) -> Tensor:
    """Clip the norm of all gradients of a model whose experts are spread over ranks.

    ``torch.nn.utils.clip_grad_norm_`` on each rank would see that rank's experts only, and every rank would scale by
    another factor. Here each expert counts once, on whichever rank it is, and everything else counts once too. Call it
    on every rank, after the gradients are averaged.

    Args:
        model: holds ``moeops.FMoE`` layers; all other gradients are taken to be equal on all ranks.
        max_norm: norm to clip to.
        norm_type: order of the norm, ``math.inf`` for the largest entry.
        error_if_nonfinite: raise where the norm is not finite, on every rank, for a host copy.
        foreach: as in torch.

    Returns:
        The norm before clipping, a scalar, the same on every rank.

    Raises:
        RuntimeError: the norm is not finite and ``error_if_nonfinite``.
    Host sync: none without ``error_if_nonfinite``.
    """
    holders: dict[nn.Parameter, RankGroup] = {}
    for _, layer in named_layers(model):
        if layer.moe_group is not None:
            holders.update(dict.fromkeys(layer.experts.parameters(), layer.moe_group))
    # DTensors of different meshes do not mix; neither do experts of different groups.
    classes: dict[Any, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        mesh = getattr(parameter, "device_mesh", None)
        classes.setdefault((holders.get(parameter), mesh), []).append(parameter)
    norm_type = float(norm_type)
    norms = []
    for (group, _), parameters in classes.items():
        norm = _norm(parameters, norm_type, foreach)
        norms.append(norm if group is None else _over_ranks(norm, norm_type, group))
    dtype = torch.float64 if any(n.dtype == torch.float64 for n in norms) else torch.float32
    total = torch.linalg.vector_norm(torch.stack([norm.to(dtype) for norm in norms]), norm_type)
    if error_if_nonfinite and not bool(total.isfinite()):
        raise RuntimeError(
            f"clip_grad_norm_: the norm of the gradients must be finite, got {float(total)}. Look for NaN in the loss, "
            "or pass error_if_nonfinite=False."
        )
    for parameters in classes.values():
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, total, foreach)
    return total


def _norm(parameters: list[nn.Parameter], norm_type: float, foreach: bool | None) -> Tensor:
    """Norm of the gradients of some parameters, float32 or float64."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads, norm_type, False, foreach)
    if hasattr(norm, "full_tensor"):  # sharded by FSDP2
        norm = norm.full_tensor()
    dtype = torch.float64 if parameters[0].dtype == torch.float64 else torch.float32
    return norm.to(parameters[0].device, dtype)


def _over_ranks(norm: Tensor, norm_type: float, group: RankGroup) -> Tensor:
    """Norm over the ranks of a group of each rank's norm."""
    ops = torch.ops._c10d_functional
    every = ops.wait_tensor(ops.all_gather_into_tensor(norm.reshape(1), group.size, group.name))
    return torch.linalg.vector_norm(every, norm_type)
