"""Hash gates: experts by token id, position or feature, nothing learned. T tokens, K experts per token, E experts."""

from __future__ import annotations

import heapq
from typing import Any

import torch
from torch import Tensor, nn

from moeops import _checks
from moeops._masks import drop_masked, hide_masked
from moeops.gates.base import BaseGate, check_top_k
from moeops.gates.functional import exact_linear

KEYS = ("token", "position", "feature")
# The multiplier of Knuth's multiplicative hash: 2 ** 32 divided by the golden ratio.
_KNUTH = 2654435761


class HashGate(BaseGate):
    """Look the experts up in a fixed random table: nothing is learned and nothing has to be balanced.

    Every weight is ``1 / K``. The table ``[num_buckets, K]`` names ``K`` different experts per bucket, each expert
    equally often in each column (but for a remainder); it is drawn once with ``seed`` and saved in ``state_dict``. A
    token's bucket is, by ``key``:

    - ``"token"``: its token id, the Hash Layers of the paper. With ``num_buckets`` at least the vocabulary's size every
      id has a bucket of its own; larger ids are hashed into the buckets. The ids come with each call, see below.
    - ``"position"``: its position in the sequence, ``t % sequence_length``.
    - ``"feature"``: the signs of ``log2(num_buckets)`` fixed random projections of ``x``, so that close tokens meet.

    **Token ids** do not fit into ``gate(x)``. Say which ids a call is about with a context, around the layers and
    inside of what is compiled, exported or checkpointed::

        def forward(self, ids):                      # of the model, ids [batch, length]
            with moeops.gates.token_ids(self, ids):  # all hash gates of the model
                return self.blocks(self.embed(ids))

    The ids are gone when the block ends, so that no later call can use stale ones: a call without ids is an error, and
    so is a recomputation by activation checkpointing whose context is not inside the checkpointed function. The gate
    can also be called as ``gate(x, ids)``.

    Departures from HetuMoE's gate of the same name:

    - HetuMoE's caller computes expert ids and hands them in; here the gate computes them, with ``key="token"`` from the
      caller's token ids. ``set_table`` installs a table of one's own.
    - Any ``top_k``; HetuMoE's is 1. Its combine without weights is the weight 1, and ``1 / K`` is that for ``K = 1``.

    Args:
        d_model: ``D``.
        num_expert: experts on this rank.
        world_size: ranks that hold different experts.
        top_k: ``K``.
        key: ``"token"``, ``"position"`` or ``"feature"``.
        num_buckets: rows of the table; a power of 2 for ``"feature"``.
        sequence_length: tokens per sequence for ``"position"``; ``None`` numbers all tokens of a call through.
        seed: of the table and of the projections; the same on every rank.
        frequencies: ``[num_buckets]`` how often each token id occurs, for ``"token"``: ids are then handed out from the
            most frequent one on, each to the experts with the least so far (the paper's balanced hash).

    Attributes:
        table: ``[num_buckets, K]`` int64.
        projections: ``[log2(num_buckets), D]`` float32, for ``"feature"`` only.

    Raises:
        ValueError: an argument does not fit, or a call has no token ids.  TypeError: a number is not an int.
    Source: Hash Layers, arXiv:2106.04426; HetuMoE, arXiv:2203.14685.

    Example:
        >>> gate = HashGate(8, 4, top_k=1, num_buckets=100)
        >>> x, ids = torch.randn(5, 8), torch.tensor([7, 3, 7, 99, 3])
        >>> with token_ids(gate, ids):
        ...     experts = gate(x)[0].view(-1)
        >>> bool(experts[0] == experts[2]) and bool(experts[1] == experts[4])
        True
    """

    has_logits = False
    table: Tensor
    projections: Tensor | None
    _token_ids: Tensor | None

    def __init__(
        self,
        d_model: int,
        num_expert: int,
        world_size: int = 1,
        top_k: int = 1,
        *,
        key: str = "token",
        num_buckets: int = 65536,
        sequence_length: int | None = None,
        seed: int = 0,
        frequencies: Tensor | None = None,
    ) -> None:
        super().__init__(num_expert, world_size)
        name = type(self).__name__
        _checks.check_int(name, "d_model", d_model, 1, "Pass the width of x.")
        check_top_k(name, top_k, self.tot_expert)
        if key not in KEYS:
            raise ValueError(f"{name}: key must be one of {KEYS}, got {key!r}. Pick one of them.")
        _checks.check_int(name, "num_buckets", num_buckets, 1, "Pass the vocabulary's size.")
        if key == "feature" and num_buckets & (num_buckets - 1):
            raise ValueError(
                f"{name}: num_buckets must be a power of 2 for key='feature', got {num_buckets}. Use 1024."
            )
        if sequence_length is not None:
            _checks.check_int(name, "sequence_length", sequence_length, 1, "Use None for none.")
        _checks.check_int(name, "seed", seed, 0, "Use 0.")
        self.d_model = d_model
        self.top_k = top_k
        self.key = key
        self.num_buckets = num_buckets
        self.sequence_length = sequence_length
        self.seed = seed
        self._token_ids = None
        self._frequencies = None if frequencies is None else self._checked(frequencies)
        self.register_buffer("table", torch.empty(num_buckets, top_k, dtype=torch.int64))
        bits = num_buckets.bit_length() - 1
        projections = None
        if key == "feature":
            projections = torch.empty(bits, d_model, dtype=torch.float32)
            self.float32_buffers = ("projections",)
        self.register_buffer("projections", projections)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw table and projections from the seed: the same every time, on every device."""
        generator = torch.Generator("cpu").manual_seed(self.seed)
        if self._frequencies is None:
            table = _even_table(self.num_buckets, self.tot_expert, self.top_k, generator)
        else:
            table = self._balanced_table(self._frequencies)
        self.table.copy_(table)
        if self.projections is not None:
            shape = self.projections.shape
            self.projections.copy_(
                torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)
            )

    def _checked(self, frequencies: Tensor) -> Tensor:
        """One count per bucket, as float64 on the CPU."""
        name = type(self).__name__
        if self.key != "token":
            raise ValueError(
                f"{name}: frequencies must be None for key={self.key!r}, got a tensor. They belong to token ids."
            )
        _checks.check_tensor(name, "frequencies", frequencies, 1)
        _checks.check_size(name, "frequencies", frequencies, 0, self.num_buckets, "num_buckets")
        counts = frequencies.detach().to("cpu", torch.float64)
        if not bool((counts >= 0).all()):
            raise ValueError(
                f"{name}: frequencies must be at least 0, got {float(counts.min())}. Pass counts."
            )
        return counts

    def _balanced_table(self, counts: Tensor) -> Tensor:
        """From the most frequent id on, each to the experts with the fewest tokens so far."""
        loads = [(0.0, 0, expert) for expert in range(self.tot_expert)]
        heapq.heapify(loads)
        rows: list[list[int]] = [[]] * self.num_buckets
        order = torch.argsort(counts, descending=True, stable=True).tolist()
        for bucket, count in zip(order, counts[order].tolist(), strict=True):
            lightest = [heapq.heappop(loads) for _ in range(self.top_k)]
            rows[bucket] = [expert for _, _, expert in lightest]
            for tokens, buckets, expert in lightest:
                # The number of buckets spreads ids out that were never seen.
                heapq.heappush(loads, (tokens + count, buckets + 1, expert))
        return torch.tensor(rows, device="cpu")

    @torch.no_grad()
    def set_table(self, table: Tensor) -> None:
        """Install a table of one's own: bucket to experts.

        Args:
            table: ``[num_buckets, K]`` int32 or int64, values in ``[0, E)``, no expert twice in a row of it.

        Raises:
            ValueError: the shape or a value does not fit.  TypeError: it does not hold integers.
        Host sync: one, to look at the values.
        """
        op = f"{type(self).__name__}.set_table"
        _checks.check_ids(op, "table", table)
        _checks.check_size(op, "table", table, 0, self.num_buckets, "num_buckets")
        _checks.check_size(op, "table", table, 1, self.top_k, "top_k")
        if bool((table < 0).any()) or bool((table >= self.tot_expert).any()):
            raise ValueError(
                f"{op}: table must hold experts in [0, {self.tot_expert}), got values from {int(table.min())} to "
                f"{int(table.max())}. Check the number of experts."
            )
        ordered = table.sort(dim=1).values
        if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
            raise ValueError(
                f"{op}: table must name different experts in each row, got one twice. Make them differ."
            )
        self.table.copy_(table)

    def forward(
        self, inp: Tensor, token_ids: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Look experts up.

        Args:
            inp: tokens, ``[T, D]``, any float type.
            token_ids: ``T`` integers in any shape, at least 0; without them those of the context ``token_ids``. Only
                ``key="token"`` reads them.
            mask: ``[T]``, tokens that are not there, whose token ids may be anything; see ``BaseGate``. They keep their
                positions.

        Returns:
            topk_ids ``[T, K]`` int64 and topk_weights ``[T, K]`` float32 (float64 for float64), all ``1 / K``.

        Raises:
            ValueError: there are no token ids, or not one per token.  TypeError: they are not integers.
        """
        if not torch.compiler.is_compiling():
            op = type(self).__name__
            _checks.check_tensor(op, "x", inp, 2)
            _checks.check_float(op, "x", inp)
            _checks.check_size(op, "x", inp, 1, self.d_model, "d_model")
        buckets = hide_masked(self._buckets(inp, token_ids), mask)
        topk_ids = drop_masked(self.table[buckets], mask)  # [T, K]
        dtype = _checks.accumulate_dtype(inp.dtype)
        weights = torch.full_like(topk_ids, 1 / self.top_k, dtype=dtype)
        return topk_ids, weights

    def _buckets(self, inp: Tensor, token_ids: Tensor | None) -> Tensor:
        """The bucket of each token, ``[T]`` int64."""
        if self.key == "position":
            positions = torch.arange(inp.shape[0], device=inp.device)
            if self.sequence_length is not None:
                positions = positions % self.sequence_length
            return _hash(positions, self.num_buckets)
        if self.key == "feature":
            assert self.projections is not None
            signs = exact_linear(inp.detach(), self.projections) > 0  # [T, bits]
            places = 2 ** torch.arange(signs.shape[1], device=inp.device)
            return (signs * places).sum(-1)
        ids = self._token_ids if token_ids is None else token_ids
        name = type(self).__name__
        if ids is None:
            raise ValueError(
                f"{name}: token_ids must be given for key='token', got none. Call the layer inside "
                "`with moeops.gates.token_ids(model, ids):`, which must stand inside of a checkpointed function."
            )
        if not torch.compiler.is_compiling():
            _checks.check_ids(name, "token_ids", ids, dim=None)
            if ids.numel() != inp.shape[0]:
                raise ValueError(
                    f"{name}: token_ids must hold one id for each of the {inp.shape[0]} tokens, got "
                    f"{_checks.describe(ids)}. Pass the ids of the tokens of this call."
                )
            _checks.check_device(name, "token_ids", ids, "x", inp)
        return _hash(ids.reshape(inp.shape[0]).to(torch.int64), self.num_buckets)

    def __getstate__(self) -> dict[str, Any]:
        # Ids belong to one call.
        return {**super().__getstate__(), "_token_ids": None}

    def extra_repr(self) -> str:
        """Sizes and options of the gate."""
        return (
            f"num_expert={self.num_expert}, world_size={self.world_size}, top_k={self.top_k}, key={self.key!r}, "
            f"num_buckets={self.num_buckets}, sequence_length={self.sequence_length}, seed={self.seed}"
        )


class token_ids:
    """Context in which the hash gates of a module look up these token ids.

    Args:
        module: a gate, a layer or a whole model; all its hash gates are told.
        ids: integers, as many as each of the gates gets tokens, in any shape.

    Raises:
        TypeError: ``module`` is not a module or ``ids`` is not a tensor.
    Host sync: none.

    Example:
        >>> from moeops import FMoETransformerMLP
        >>> layer = FMoETransformerMLP(4, 8, 16, top_k=1, gate=HashGate)
        >>> with token_ids(layer, torch.arange(6).view(2, 3)):
        ...     y = layer(torch.randn(2, 3, 8))
        >>> y.shape
        torch.Size([2, 3, 8])
    """

    def __init__(self, module: nn.Module, ids: Tensor) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"token_ids: module must be a torch.nn.Module, got {_checks.describe(module)}. Pass the model."
            )
        if not isinstance(ids, Tensor):
            raise TypeError(
                f"token_ids: ids must be a tensor, got {_checks.describe(ids)}. Pass the token ids."
            )
        self._gates = [gate for gate in module.modules() if isinstance(gate, HashGate)]
        self._before = [gate._token_ids for gate in self._gates]
        self._ids = ids

    def __enter__(self) -> None:
        for gate in self._gates:
            gate._token_ids = self._ids

    def __exit__(self, *exc: object) -> None:
        for gate, before in zip(self._gates, self._before, strict=True):
            gate._token_ids = before


def _hash(values: Tensor, num_buckets: int) -> Tensor:
    """Values below ``num_buckets`` are buckets themselves; larger ones are hashed. int64 in and out."""
    # Products of int64 wrap around alike on every device; the shift takes the well-mixed upper half.
    mixed = (values * _KNUTH) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 15)) * _KNUTH & 0xFFFFFFFF) % num_buckets
    return torch.where(values < num_buckets, values, mixed)


def _even_table(buckets: int, num_experts: int, top_k: int, generator: torch.Generator) -> Tensor:
    """Random rows of ``top_k`` different experts, each expert equally often in each column."""
    # A Latin square: shifting the experts of a column by different numbers keeps rows free of repetitions and columns
    # even. Renaming the experts takes the regularity out of the pairs.
    shifts = torch.randperm(num_experts, generator=generator, device="cpu")[:top_k]
    names = torch.randperm(num_experts, generator=generator, device="cpu")
    first = torch.arange(buckets, device="cpu") % num_experts
    first = first[torch.randperm(buckets, generator=generator, device="cpu")]
    return names[(first[:, None] + shifts) % num_experts].to(torch.int64)
