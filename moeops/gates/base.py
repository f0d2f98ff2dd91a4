"""What a gate takes and returns. T tokens, K experts per token, E experts, D model width."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moeops import _checks
from moeops._tracing import exporting
from moeops.comm.groups import RankGroup, rank_group
from moeops.gates.recording import Newest
from moeops.losses.logits import GATE_LOSSES

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

GateLoss = Callable[..., Tensor]


def _whole_job(ranks: int) -> RankGroup | None:
    """All processes, if they are that many: the ranks of a gate above one rank that nobody has told of any."""
    dist = torch.distributed
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() != ranks:
        return None
    return rank_group(dist.group.WORLD)


class BaseGate(nn.Module):
    """Base of all gates: subclass it, write ``forward`` in plain PyTorch, and hand the class to a layer.

    ``forward(x [T, D])`` returns ``(topk_ids [T, K], topk_weights [T, K])``: int64 (or int32) expert ids in
    ``[-1, E)``, -1 for a dropped slot, and the float weights of the experts' outputs. Layers call the class as
    ``gate(d_model, num_expert, world_size, top_k)``, with ``gate_bias=`` where the constructor takes it.

    An auxiliary loss goes to ``set_loss`` in ``forward``; the training loop fetches it with ``get_loss``, or those of
    all gates with ``moeops.auxiliary_loss``. Only the newest loss is held, so that a training loop that fetches none
    keeps no graphs; for a layer that is called several times in one forward set ``sum_losses = True``, and losses add
    up until they are fetched. With ``moeops.inject_auxiliary_loss`` nobody fetches them. What happens to a loss
    elsewhere:

    - ``torch.compile``: the loss is one more output of the graph. ``torch.export``: skipped, an exported program has
      no attributes to write to.
    - Activation checkpointing: the recomputation in the backward does not set the loss a second time. With
      ``use_reentrant=True`` torch runs the forward without gradients, so the loss has a value but no gradient; use
      ``use_reentrant=False``. A checkpoint inside a compiled function needs
      ``torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True``, which says the same to torch.
    - ``nn.DataParallel``: the replicas' losses vanish with the replicas; return the loss from the model's forward.
    - ``copy.deepcopy`` and pickle drop it.

    A layer's mask, which names tokens that are not there (padding), reaches a gate whose ``forward`` has an argument
    ``mask``: ``[T]`` integers or bool, other than 0 for a masked token, ``None`` without a mask. The rows of masked
    tokens must be finite: layers hand over zeros, or what is there where ``mask_dict`` asks for weights. The gate gives
    masked tokens id -1 in all slots and leaves them out of what it counts: capacities, loads, losses
    (``set_loss(..., mask=mask)``). Their weights count for ``mask_dict`` alone. Where a gate has no such argument, the
    layer takes the masked tokens' ids away afterwards; they have taken places and counted by then.

    A gate that has to know the other ranks' tokens reads ``self.group``: the ranks that it is told of, ``None`` until
    somebody sets it, as a layer does. A gate without a layer takes the whole job where that has as many ranks as hold
    the experts. Set a process group; what is kept is its ``moeops.distributed.RankGroup``, which can be copied.

    Args:
        num_expert: experts on this rank.
        world_size: ranks that hold different experts; the gate chooses among ``num_expert * world_size``.

    Raises:
        ValueError: a number is below 1.  TypeError: a number is not an int.

    Example:
        >>> class RandomGate(BaseGate):
        ...     def __init__(self, d_model, num_expert, world_size, top_k=2):
        ...         super().__init__(num_expert, world_size)
        ...         self.top_k = top_k
        ...     def forward(self, x):
        ...         weights, ids = torch.rand(x.shape[0], self.tot_expert).topk(self.top_k)
        ...         return ids, weights / weights.sum(-1, keepdim=True)
        >>> RandomGate(8, 4, 1)(torch.randn(5, 8))[0].shape
        torch.Size([5, 2])
    """

    extra_losses: tuple[tuple[GateLoss, float], ...] = ()
    # forward has an argument mask; wrappers that pass attributes on show it for the gate inside.
    takes_mask = False
    # Losses that were not fetched yet add up; otherwise the newest one replaces them.
    sum_losses = False
    # Factor of the loss whose gradient the layer injects; None where the training loop fetches the loss.
    loss_scale: float | Tensor | None = None
    _injected: Tensor | None = None
    # False in gates that hand no logits to set_loss: losses of logits are refused there.
    has_logits = True
    # Keep the logits of the newest forward for get_logits; see moeops.keep_logits.
    keep_logits = False
    # Buffers that stay float32 when the module is cast.
    float32_buffers: tuple[str, ...] = ()
    # Ranks that hold one expert together, each a shard of it; set by the layer. The ranks are world_size times as many.
    expert_shards = 1
    _group: RankGroup | None = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.takes_mask = takes_mask(cls.forward)

    def __init__(self, num_expert: int, world_size: int = 1) -> None:
        super().__init__()
        name = type(self).__name__
        _checks.check_int(name, "num_expert", num_expert, 1, "Pass the experts per rank.")
        _checks.check_int(name, "world_size", world_size, 1, "Use 1 for one rank.")
        self.num_expert = num_expert
        self.world_size = world_size
        self.tot_expert = num_expert * world_size
        self._newest_loss: Newest[Tensor] = Newest()
        self._newest_logits: Newest[Tensor] = Newest()

    def forward(self, x: Tensor) -> Any:
        """Choose experts: ``x [T, D]`` to ``(topk_ids [T, K], topk_weights [T, K])``."""
        raise NotImplementedError(
            f"{type(self).__name__}: forward must be written by the subclass, got a call of BaseGate's. "
            "Return (topk_ids [T, K], topk_weights [T, K])."
        )

    @property
    def group(self) -> RankGroup | None:
        """The ranks that this gate may ask for their counts, ``None`` for this rank alone."""
        return self._group

    @group.setter
    def group(self, group: ProcessGroup | RankGroup | None) -> None:
        self._group = rank_group(group)

    def _moe_group(self, why: str) -> RankGroup | None:
        """The ranks that hold the other experts; ``None`` if all experts are here."""
        ranks = self.world_size * self.expert_shards
        if ranks == 1:
            return None
        group = self._group or _whole_job(ranks)
        if group is None:
            raise ValueError(
                f"{type(self).__name__}: group must be set for {why} with world_size = {ranks}, got None, and the "
                "whole job has another number of ranks. Pass group=, the ranks that hold the experts, or set "
                "gate.group."
            )
        if group.size != ranks:
            raise ValueError(
                f"{type(self).__name__}: group must have world_size = {ranks} ranks for {why}, got "
                f"{group.size}. Pass the ranks that hold the experts."
            )
        return group

    def _balance_group(self) -> RankGroup | None:
        """The ranks to balance over; ``None`` if there is one process only."""
        if self._group is not None:
            return self._group
        ranks = self.world_size * self.expert_shards
        if ranks > 1 and (job := _whole_job(ranks)) is not None:
            return job
        dist = torch.distributed
        alone = not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1
        if self.world_size > 1 or not alone:
            raise ValueError(
                f"{type(self).__name__}: group must be set for a loss over all ranks, got None. "
                "Pass group=, the ranks whose tokens count together, or set gate.group."
            )
        return None

    def set_loss(
        self,
        loss: Tensor | None,
        logits: Tensor | None = None,
        topk_ids: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> None:
        """Keep the auxiliary loss of this forward in place of an earlier one, or with ``sum_losses`` in addition to it.

        Args:
            loss: a scalar, or ``None`` for a gate without a loss of its own.
            logits: ``[T, E]``, what the losses of ``add_loss`` and ``get_logits`` read. A gate that passes logits and
                choices can be given any of them; it may leave the logits out where ``reads_logits`` is false.
            topk_ids: ``[T, K]``, the choices before any token is dropped; -1 for masked tokens.
            mask: ``[T]``, the tokens that are not there, for the losses of ``add_loss``.
        """
        if self.extra_losses and not exporting():
            if logits is None or topk_ids is None:
                raise RuntimeError(
                    f"{type(self).__name__}: set_loss must get logits and topk_ids for the losses of add_loss, got "
                    "none. Pass them in the gate's forward."
                )
            for function, weight in self.extra_losses:
                extra = weight * function(logits, topk_ids, mask=mask)
                loss = extra if loss is None else loss + extra
        if self.keep_logits:
            if logits is None:
                raise RuntimeError(
                    f"{type(self).__name__}: set_loss must get logits where they are kept, got none. Pass them in the "
                    "gate's forward, or set keep_logits = False."
                )
            self._newest_logits.set(logits)
        if loss is None:
            return
        if self.loss_scale is not None and not exporting():
            self._injected = loss  # the layer takes it at once, in a recomputation too
            return
        before = self._newest_loss.get() if self.sum_losses else None
        self._newest_loss.set(loss if before is None else before + loss)

    @property
    def reads_logits(self) -> bool:
        """Something reads the logits that ``set_loss`` gets: a loss of ``add_loss``, or ``keep_logits``."""
        return bool(self.extra_losses) or self.keep_logits

    def add_loss(self, loss: str | GateLoss, weight: float = 1.0) -> BaseGate:
        """Add a loss of the logits to the gate's own loss, in every forward from here on.

        All gates of this library that have logits take it. The weight is on top of the one that the training loop
        gives to ``auxiliary_loss``, and relative to the gate's own loss, whose weight is 1.

        Args:
            loss: ``"z"``, ``"entropy"``, ``"switch"`` or ``"gshard"`` (see ``moeops.losses``), or a function of
                logits ``[T, E]`` and topk_ids ``[T, K]`` that returns a scalar. With a layer's mask one that has an
                argument ``mask`` gets it too; others see finite logits and id -1 for masked tokens.
            weight: factor; negative to reward, as one may the entropy.

        Returns:
            The gate, so that calls chain.

        Raises:
            ValueError: the name is unknown or the weight not finite.  TypeError: ``loss`` is neither, or the gate has
            no logits.

        Example:
            >>> from moeops.gates import NaiveGate
            >>> gate = NaiveGate(8, 4).add_loss("z", 1e-3).add_loss("entropy", -1e-2)
            >>> _ = gate(torch.randn(5, 8))
            >>> gate.get_loss().shape
            torch.Size([])
        """
        op = f"{type(self).__name__}.add_loss"
        if not self.has_logits:
            raise TypeError(
                f"{op}: the gate must have logits [T, E] for a loss of them, got one without. Use another gate, or "
                "the inner gate of a wrapper."
            )
        if isinstance(loss, str):
            if loss not in GATE_LOSSES:
                raise ValueError(
                    f"{op}: loss must be one of {tuple(GATE_LOSSES)}, got {loss!r}. Pick one or pass a function."
                )
            function: GateLoss = GATE_LOSSES[loss]
        elif callable(loss):
            function = loss
        else:
            raise TypeError(
                f"{op}: loss must be a name or a function of (logits, topk_ids), got {_checks.describe(loss)}. "
                f"The names are {tuple(GATE_LOSSES)}."
            )
        if not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise ValueError(f"{op}: weight must be a finite number, got {weight!r}. Use 1e-3.")
        self.extra_losses = (*self.extra_losses, (with_mask_argument(function), float(weight)))
        return self

    def get_loss(self, clear: bool = True) -> Tensor | None:
        """Hand over the auxiliary loss: a scalar with a gradient to the gate, ``None`` if there is none.

        Args:
            clear: forget it, so that it is counted once and its graph can be freed.
        """
        loss = self._newest_loss.get()
        if clear:
            self._newest_loss.clear()
        return loss

    def take_injected(self) -> Tensor | None:
        """Hand the loss of this call over to the layer that injects it, ``None`` if there is none."""
        # A recomputation that ends early leaves one here, which the next call replaces.
        loss, self._injected = self._injected, None
        return loss

    def get_logits(self, clear: bool = True) -> Tensor | None:
        """Hand over the logits ``[T, E]`` of the newest forward, with their gradient; ``None`` if none were kept.

        They are what the gate chooses from, noise included, float32 (float64 for float64 tokens), and are kept where
        ``keep_logits`` is true, as the loss is: see above.

        Args:
            clear: forget them, so that their graph can be freed.
        """
        logits = self._newest_logits.get()
        if clear:
            self._newest_logits.clear()
        return logits

    @property
    def loss(self) -> Tensor | None:
        """The auxiliary loss that was not fetched yet; reading it does not fetch it."""
        return self._newest_loss.get()

    @property
    def has_loss(self) -> bool:
        """A forward has set a loss that was not fetched yet."""
        return self.loss is not None

    def after_step(self, progress: float) -> None:
        """What the gate does beside its gradient, once after each optimizer step; by default nothing.

        ``moeops.update_gates`` calls this for all gates of a model.

        Args:
            progress: the part of training that is over, in ``[0, 1]``.
        """

    @classmethod
    def _after_step_together(cls, gates: Sequence[Any], progress: float) -> None:
        """``after_step`` of all gates of a model that share this method; for gates that decide together."""
        for gate in gates:
            gate.after_step(progress)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BaseGate:
        before = {name: getattr(self, name) for name in self.float32_buffers}
        out = super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            if new.dtype != torch.float32:
                # The values of before: a trip through a half type would round them.
                setattr(self, name, (new if old.is_meta else old).to(new.device, torch.float32))
        return out

    def _replicate_for_data_parallel(self) -> BaseGate:
        replica = super()._replicate_for_data_parallel()
        replica._newest_loss, replica._newest_logits = Newest(), Newest()
        return replica

    def __getstate__(self) -> dict[str, Any]:
        # They are part of one forward's graph: deepcopy refuses them and pickle has no use for them.
        fresh: dict[str, Any] = {
            "_newest_loss": Newest(),
            "_newest_logits": Newest(),
            "_injected": None,
        }
        return {**self.__dict__, **fresh}


def with_losses(gate: Callable[..., BaseGate], **weights: float) -> Callable[..., BaseGate]:
    """Make a layer's ``gate=`` argument of a gate and losses: a factory that calls ``add_loss`` on what it builds.

    Args:
        gate: a gate class or a function that builds a gate.
        **weights: weight by name, the names of ``BaseGate.add_loss``.

    Returns:
        A function with the arguments of ``gate``.

    Raises:
        ValueError: a name is unknown or a weight not finite, when the gate is built.

    Example:
        >>> from moeops import FMoETransformerMLP
        >>> from moeops.gates import SwitchGate
        >>> layer = FMoETransformerMLP(4, 8, 16, top_k=1, gate=with_losses(SwitchGate, z=1e-3))
        >>> len(layer.gate.extra_losses)
        1
    """

    @functools.wraps(gate, updated=())
    def build(*args: Any, **kwargs: Any) -> BaseGate:
        built = gate(*args, **kwargs)
        for name, weight in weights.items():
            built.add_loss(name, weight)
        return built

    return build


def takes_mask(function: Callable[..., Any]) -> bool:
    """A function names an argument ``mask``, or takes any keyword."""
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # no signature: a builtin
        return False
    return "mask" in parameters or any(
        p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()
    )


class _WithoutMask:
    """A function that does not know of masks, called as if it did."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any, mask: Tensor | None = None) -> Any:
        return self.function(*args)


def with_mask_argument(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a function that has no argument ``mask`` one that it does not see."""
    return function if takes_mask(function) else _WithoutMask(function)


def check_top_k(gate: str, top_k: Any, num_experts: int) -> None:
    """``top_k`` is an int from 1 to the number of experts."""
    _checks.check_int(gate, "top_k", top_k, 1, "Choose 1 <= top_k <= num_expert * world_size.")
    if top_k > num_experts:
        raise ValueError(
            f"{gate}: top_k must be at most the {num_experts} experts, got {top_k}. Lower top_k."
        )


def auxiliary_loss(model: nn.Module, clear: bool = True) -> Tensor:
    """Sum the losses that the gates of a model have set and that were not fetched yet.

    Call it after each forward, before the backward: with gradient accumulation once per micro-batch, scaled like the
    micro-batch's own loss. Inside a compiled function it is part of the graph. A gate that several layers share, or
    whose layer is called several times, is counted once, with the loss of its newest forward; with ``gate.sum_losses =
    True`` with those of all forwards. Where no loss of the model is in reach, as in a pipeline, use
    ``inject_auxiliary_loss``.

    Args:
        model: any module; every ``BaseGate`` in ``model.modules()`` is asked.
        clear: forget the losses, so that each is counted once and its graph can be freed.

    Returns:
        A scalar with gradients to the gates, at least float32, on the device of the model's first parameter; 0 if no
        gate has a loss.

    Raises:
        TypeError: ``model`` is not a module.
    Host sync: none.

    Example:
        >>> from moeops.gates import SwitchGate
        >>> model = nn.ModuleList(SwitchGate(8, 4) for _ in range(2))
        >>> _ = [gate(torch.randn(5, 8)) for gate in model]
        >>> bool(auxiliary_loss(model) > 0), float(auxiliary_loss(model))
        (True, 0.0)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"auxiliary_loss: model must be a torch.nn.Module, got {_checks.describe(model)}. "
            "Pass the module that holds the gates."
        )
    first = next(model.parameters(), None)
    device = None if first is None else first.device
    total = torch.zeros((), device=device, dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, BaseGate):
            loss = module.get_loss(clear)
            if loss is not None:
                total = total + loss.to(total.device)
    return total


def update_gates(model: nn.Module, progress: float) -> None:
    """Do what the gates of a model do beside their gradients: call this once after each optimizer step.

    ``DeepSeekV3Gate`` moves its bias by ``bias_speed``, ``DenseToSparseGate`` anneals its temperature, and all
    ``ReMoEGate`` update their coefficients together; own gates write ``BaseGate.after_step``. Gates without anything to
    do are left alone, and so is a model without gates.

    Args:
        model: any module; every ``BaseGate`` in ``model.modules()`` takes part.
        progress: the part of training that is over, in ``[0, 1]``: ``step / steps``.

    Raises:
        ValueError: ``progress`` is out of range, or a gate needs a group and has none.  TypeError: ``model`` is not a
        module.
    Host sync: none.

    Example:
        >>> from moeops.gates import DenseToSparseGate
        >>> gate = DenseToSparseGate(8, 4, temperature=2.0, final_temperature=0.5)
        >>> update_gates(gate, 0.5)
        >>> float(gate.temperature)
        1.0
    """
    op = "update_gates"
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{op}: model must be a torch.nn.Module, got {_checks.describe(model)}. Pass the module that holds the "
            "gates."
        )
    if not isinstance(progress, (int, float)) or not 0 <= progress <= 1:
        raise ValueError(f"{op}: progress must be in [0, 1], got {progress!r}. Pass step / steps.")
    together: dict[Any, list[BaseGate]] = {}
    for module in model.modules():
        if isinstance(module, BaseGate):
            method: Any = type(module)._after_step_together
            together.setdefault(method.__func__, []).append(module)
    for gates in together.values():
        gates[0]._after_step_together(gates, progress)
