"""The experts of a transformer MLP with fused weights. R rows, E experts, D model width, H hidden width."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeops import _checks
from moeops.dispatch.region import Region
from moeops.dispatch.shards import ShardSpan, take_shard
from moeops.layers._fastmoe_keys import fused_names
from moeops.layers._weights import plain_weight
from moeops.layers.linear import check_init, init_linear_
from moeops.ops.activations import ACTIVATIONS, check_activation, up_width
from moeops.ops.grouped_linear import grouped_linear
from moeops.ops.moe_mlp import moe_mlp
from moeops.ops.permute import permute_tokens, unpermute_tokens
from moeops.types import Glu, TokenPlan

Activation = str | Glu | Callable[[Tensor], Tensor]

# What torch.nn.utils.parametrize and torch.nn.utils.prune make of a parameter's name.
_ADAPTED = re.compile(r"parametrizations\.(\w+)\..+|(\w+)_(?:orig|mask)")

_FUNCTIONS = {F.gelu: "gelu", F.relu: "relu", torch.relu: "relu", F.silu: "silu"}


class Uncast:
    """Routing weights in a box: what casts the tensors among a module's arguments does not see them.

    Attributes:
        weights: ``[T, K]`` float.
    """

    __slots__ = ("weights",)

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights


def casts_arguments(module: nn.Module) -> bool:
    """Whether FSDP wraps the module: with mixed precision it casts every float argument of a unit."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return False
    units = (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)
    return any(isinstance(part, units) for part in module.modules())


def fused_activation(activation: Activation) -> str | Glu | None:
    """Return the fused activation that computes the same, ``None`` if there is none.

    Exact types only: a subclass may compute something else.
    """
    if isinstance(activation, (str, Glu)):
        check_activation("FusedExperts", activation)
        return activation
    if type(activation) is nn.GELU:
        return "gelu" if activation.approximate == "none" else None
    if type(activation) is nn.ReLU:
        return "relu"
    if type(activation) is nn.SiLU:
        return "silu"
    if isinstance(activation, nn.Module):
        return None
    if not callable(activation):
        raise TypeError(
            f"FusedExperts: activation must be one of {ACTIVATIONS}, a moeops.Glu, a module or a function, got "
            f"{activation!r}. Pick a name or pass a callable."
        )
    try:
        return _FUNCTIONS.get(activation)
    except TypeError:  # an unhashable callable
        return None


class FusedExperts(nn.Module):
    """Hold the weights of all expert MLPs in one tensor per projection, and run the whole block as one op.

    With an activation that has no fused kernel (any module or function that is not ReLU, SiLU or exact GELU) the block
    is composed of ``permute_tokens``, ``grouped_linear``, the activation, ``grouped_linear`` and ``unpermute_tokens``.
    Same parameters and result, more memory. The activation then sees rows ``[R, H]`` of all experts, and one row more
    per dropped pair, whose result is not used.

    With ``num_shards`` it holds one shard of every expert: ``H / P`` hidden units, and a part of ``b_down``. The
    outputs of an expert's ``P`` shards add up to the expert's. A shard starts as that part of a whole expert, drawn
    with the random state of this process: with equal states the shards are those of one expert.

    Args:
        num_expert: ``E``.
        d_model: ``D``.
        d_hidden: ``H``, of a whole expert.
        activation: as ``moe_mlp`` takes it ("swiglu", "geglu_tanh", "gelu", "relu", "silu", "relu_squared" or a
            ``Glu``), or a callable on rows.
        bias: give both projections a bias.
        num_shards: ``P``, a divisor of ``H``; above 1 the activation must be one of ``moe_mlp``'s.
        shard: which one this is, below ``P``.
        init: "linear" to start each expert's projections like an ``nn.Linear``, or "fastmoe" for FastMoE's start:
            weights ``sqrt(H)`` and ``sqrt(D)`` times smaller, biases zero.
        dtype: type of the parameters, torch's default if ``None``.
        device: device of the parameters, torch's default if ``None``.

    Attributes:
        weight_names: parameters with the experts in dimension 0; others are an activation's.
        w_up: ``[E, 2 H, D]`` (gate rows, then up rows) for gated units, else ``[E, H, D]``; ``H / P`` for ``H`` in a
            shard. The rows of an interleaved ``Glu`` are gate and up in turns.
        w_down: ``[E, D, H]``.
        b_up: ``[E, 2 H or H]`` or ``None``.
        b_down: ``[E, D]`` or ``None``; in a shard ``[E, D / P]``, with one more in the first ``D % P`` shards.

    Raises:
        ValueError: a size is below 1 or does not fit, or the activation is unknown or cannot be sharded.
        TypeError: a size is not an int.

    Example:
        >>> experts = FusedExperts(4, 8, 16, activation="swiglu", bias=False)
        >>> {name: list(p.shape) for name, p in experts.named_parameters()}
        {'w_up': [4, 32, 8], 'w_down': [4, 8, 16]}
    """

    weight_names: ClassVar[tuple[str, ...]] = ("w_up", "w_down", "b_up", "b_down")
    b_up: Tensor | None
    b_down: Tensor | None

    def __init__(
        self,
        num_expert: int,
        d_model: int,
        d_hidden: int,
        activation: Activation = "swiglu",
        bias: bool = True,
        *,
        num_shards: int = 1,
        shard: int = 0,
        init: str = "linear",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        for name, size in (
            ("num_expert", num_expert),
            ("d_model", d_model),
            ("d_hidden", d_hidden),
            ("num_shards", num_shards),
        ):
            _checks.check_int("FusedExperts", name, size, 1, "Sizes are at least 1.")
        _checks.check_int("FusedExperts", "shard", shard, 0, "Shards count from 0.")
        self.num_expert = num_expert
        self.d_model = d_model
        self.d_hidden = d_hidden
        self.num_shards = num_shards
        self.shard = shard
        check_init("FusedExperts", init)
        self.init = init
        self.fused_activation = fused_activation(activation)
        self._check_shards(activation)
        # A fused one needs no submodule; another one may have parameters, so it becomes one.
        self.activation = activation if self.fused_activation is None else self.fused_activation
        hidden = d_hidden // num_shards
        up = up_width(hidden, self.fused_activation)
        empty: dict[str, Any] = {"dtype": dtype, "device": device}
        self.w_up = nn.Parameter(torch.empty(num_expert, up, d_model, **empty))
        self.w_down = nn.Parameter(torch.empty(num_expert, d_model, hidden, **empty))
        if bias:
            _, out = self._outputs(shard)
            self.b_up = nn.Parameter(torch.empty(num_expert, up, **empty))
            self.b_down = nn.Parameter(torch.empty(num_expert, out, **empty))
        else:
            self.register_parameter("b_up", None)
            self.register_parameter("b_down", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new parameters as ``init`` says, with the fan-in of one expert; the memory is that of whole ones."""
        if self.num_shards == 1:
            init_linear_(self.w_up, self.b_up, self.init)
            init_linear_(self.w_down, self.b_down, self.init)
            return
        # Of whole experts, so that equal random states give neither equal shards nor unequal states afterwards.
        for weight, bias in (("w_up", "b_up"), ("w_down", "b_down")):
            whole: dict[str, Tensor] = {}
            for name in (weight, bias) if self.b_up is not None else (weight,):
                parameter, span = getattr(self, name), self.shard_span(name)
                shape = list(parameter.shape)
                shape[span.dim] = span.size
                whole[name] = torch.empty(shape, dtype=parameter.dtype, device=parameter.device)
            init_linear_(whole[weight], whole.get(bias), self.init)
            with torch.no_grad():
                for name, values in whole.items():
                    _fill(getattr(self, name), take_shard(values, self.shard_span(name)))

    def __len__(self) -> int:
        """``E``."""
        return self.num_expert

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load a state dict, one that FastMoE's layer has saved too."""
        renamed, errors = fused_names(state_dict, prefix, self.num_expert)
        error_msgs += errors
        for name in renamed if self.num_shards > 1 else ():
            span = self.shard_span(name)
            state_dict[prefix + name] = take_shard(state_dict[prefix + name], span)
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )

    def shard_span(self, name: str, shard: int | None = None) -> ShardSpan:
        """Say what of whole experts a parameter holds.

        Args:
            name: "w_up", "w_down", "b_up" or "b_down".
            shard: on which shard; ``None`` for this one.

        Returns:
            The dimension that is divided and what of it is there: dimension 1 for all but ``w_down``, which has 2.
        """
        shard = self.shard if shard is None else shard
        if name == "b_down":
            return ShardSpan(1, self.d_model, (self._outputs(shard),))
        width = self.d_hidden // self.num_shards
        if name == "w_down":
            return ShardSpan(2, self.d_hidden, ((shard * width, width),))
        total = up_width(self.d_hidden, self.fused_activation)
        if getattr(self.fused_activation, "interleaved", False):
            return ShardSpan(1, total, ((2 * shard * width, 2 * width),))
        # Of the halves of a gated unit the same hidden units.
        starts = range(shard * width, total, self.d_hidden)
        return ShardSpan(1, total, tuple((start, width) for start in starts))

    @classmethod
    def weight_of(cls, name: str) -> str | None:
        """Say to which of ``weight_names`` a tensor of the state dict belongs, ``None`` for an activation's.

        A parametrization keeps a weight, and tensors of its own, under ``parametrizations.NAME.``; pruning keeps
        ``NAME_orig`` and ``NAME_mask``.

        Example:
            >>> FusedExperts.weight_of("parametrizations.w_up.original"), FusedExperts.weight_of("w_down_mask")
            ('w_up', 'w_down')
        """
        found = _ADAPTED.fullmatch(name)
        weight = name if found is None else found[1] or found[2]
        return weight if weight in cls.weight_names else None

    def _outputs(self, shard: int) -> tuple[int, int]:
        """The first output, and how many, to which a shard adds the bias: parts as of ``torch.tensor_split``."""
        share, more = divmod(self.d_model, self.num_shards)
        return shard * share + min(shard, more), share + (shard < more)

    def _check_shards(self, activation: Activation) -> None:
        """Refuse what cannot be cut into ``num_shards``."""
        num_shards = self.num_shards
        if self.shard >= num_shards:
            raise ValueError(
                f"FusedExperts: shard must be below the {num_shards} shards, got {self.shard}. Shards count from 0."
            )
        if self.d_hidden % num_shards:
            raise ValueError(
                f"FusedExperts: d_hidden must be a multiple of the {num_shards} shards of an expert, got "
                f"{self.d_hidden}. Choose another number of shards."
            )
        if self.d_model < num_shards:
            raise ValueError(
                f"FusedExperts: d_model must be at least the {num_shards} shards of an expert, got {self.d_model}. "
                "Choose another number of shards."
            )
        if num_shards > 1 and self.fused_activation is None:
            raise ValueError(
                f"FusedExperts: activation must be one of {ACTIVATIONS} or a moeops.Glu for experts in {num_shards} "
                f"shards, got {activation!r}, which may mix hidden units. Pick one of them, or hold whole experts."
            )

    def forward(
        self,
        x: Tensor,
        topk_weights: Tensor | Uncast | None = None,
        plan: TokenPlan | Region | None = None,
        *,
        expert_offsets: Tensor | None = None,
    ) -> Tensor:
        """Run tokens through their experts and sum the results, weighted; or rows through theirs.

        Args:
            x: tokens, ``[T, D]``; with ``expert_offsets`` rows in expert order, ``[R, D]``.
            topk_weights: ``[T, K]`` float, for tokens; in an ``Uncast`` where FSDP would round them.
            plan: what ``moeops.sort_tokens`` returned for these tokens; or a dispatcher's ``Region``, with which ``x``
                and ``topk_weights`` are what that wants, and experts of all ranks run.
            expert_offsets: ``[E + 1]`` int32, for rows: expert ``e`` owns rows ``[e]`` to ``[e + 1]``.

        Returns:
            ``[T, D]``; for rows ``[R, D]``, zero past the last offset.

        Raises:
            TypeError: neither ``topk_weights`` and ``plan`` nor ``expert_offsets`` alone are given.
        """
        if isinstance(topk_weights, Uncast):
            topk_weights = topk_weights.weights
        if isinstance(plan, Region):
            return plan.run(
                x,
                topk_weights,
                self._weight("w_up"),
                self._weight("w_down"),
                b_up=self._weight("b_up"),
                b_down=self._whole_b_down(),
                activation=self.fused_activation,  # type: ignore[arg-type]  # regions have fused ones
            )
        if (topk_weights is None, plan is None) != (expert_offsets is not None,) * 2:
            raise TypeError(
                "FusedExperts: topk_weights and plan must be given for tokens, or expert_offsets alone for rows, got "
                f"{_checks.describe(topk_weights)}, {_checks.describe(plan)} and {_checks.describe(expert_offsets)}. "
                "Pass one or the other."
            )
        if self.fused_activation is None:
            if plan is None:
                return self._rows(x, expert_offsets)  # type: ignore[arg-type]  # as checked
            rows = self._rows(permute_tokens(x, plan), plan.expert_offsets)
            return unpermute_tokens(rows, plan, topk_weights)
        if expert_offsets is not None:
            # Every row a token of its own, where it is: one op still, which keeps the pre-activation only.
            row = torch.arange(x.shape[0], dtype=torch.int32, device=x.device)
            plan = TokenPlan(row, row[:, None], expert_offsets)
            dtype = _checks.accumulate_dtype(x.dtype)
            topk_weights = torch.ones(x.shape[0], 1, dtype=dtype, device=x.device)
        return moe_mlp(
            x,
            plan,  # type: ignore[arg-type]  # as checked
            topk_weights,  # type: ignore[arg-type]  # as checked
            self._weight("w_up"),
            self._weight("w_down"),
            b_up=self._weight("b_up"),
            b_down=self._whole_b_down(),
            activation=self.fused_activation,
        )

    def _weight(self, name: str) -> Any:
        """A parameter as the ops take it; ``None`` for a bias that is not there."""
        return plain_weight("FusedExperts", name, getattr(self, name))

    def _whole_b_down(self) -> Tensor | None:
        """``b_down [E, D]``, in a shard with zeros where other shards have theirs."""
        b_down = self._weight("b_down")
        if b_down is None or self.num_shards == 1:
            return b_down
        start, length = self._outputs(self.shard)
        return F.pad(b_down, (start, self.d_model - start - length))

    def _rows(self, rows: Tensor, expert_offsets: Tensor) -> Tensor:
        """Rows ``[R, D]`` through an activation without a fused kernel."""
        w_up, w_down = self._weight("w_up"), self._weight("w_down")
        hidden = grouped_linear(rows, w_up, expert_offsets, bias=self._weight("b_up"))
        hidden = self.activation(hidden)  # type: ignore[operator]  # [R, H]; a name has a kernel
        return grouped_linear(hidden, w_down, expert_offsets, bias=self._weight("b_down"))

    def extra_repr(self) -> str:
        """Sizes and options of the experts."""
        text = f"num_expert={self.num_expert}, d_model={self.d_model}, d_hidden={self.d_hidden}"
        if not isinstance(self.activation, nn.Module):
            name = getattr(self.activation, "__name__", self.activation)
            text += f", activation={name!r}"
        if self.num_shards > 1:
            text += f", shard={self.shard} of {self.num_shards}"
        return f"{text}, bias={self.b_up is not None}"


def _fill(parameter: Any, values: Tensor) -> None:
    """Copy values into a parameter, of which FSDP2 may have left some rows here."""
    if hasattr(parameter, "device_mesh"):
        chunk = parameter.__create_chunk_list__()[0]
        for dim, (start, length) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
            values = values.narrow(dim, start, length)
        parameter = parameter.to_local()
    parameter.copy_(values)
