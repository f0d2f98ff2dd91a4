"""Record what the gates of a model decide, and make them decide it again. T tokens, K experts per token, E experts."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moeops import _checks
from moeops.gates.recording import Newest, exporting
from moeops.layers.moe import FMoE
from moeops.layers.walk import LayerHook, add_hook, find_layers, remove_hook
from moeops.types import Routing, SlotRouting

WEIGHTS = ("recorded", "gate")
Decision = tuple[Tensor, Tensor]


class RoutingReplay:
    """Record the routing of every ``FMoE`` layer of a model, and replay it in other forwards.

    For debugging (which part of a difference comes from another choice of experts?), for benchmarks with the routing
    of real data, and for reinforcement learning, where training should send the tokens of a rollout to the experts
    that the rollout used.

        replay = RoutingReplay(model)
        replay.record()
        model(x)
        decisions = replay.take()        # {layer name: (topk_ids, topk_weights)}, on the device
        replay.replay(decisions)
        model(x)                         # the same experts, whatever the gates say
        replay.stop()

    A decision is a pair of plain tensors, ``topk_ids [T, K]`` and ``topk_weights [T, K]``; behind a gate that mixes
    tokens (``SlotRouting``), ``dispatch_weights`` and ``combine_weights``. ``torch.save`` it, move it, slice it.

    While it replays, the gates still run: their losses and statistics are those of their own choices. With
    ``weights="recorded"`` no gradient reaches them from the output; with ``weights="gate"`` the recorded experts get
    the weights that the gate gives them now, with gradients, for gates that have ``weights_at`` (``NaiveGate``,
    ``TopKGate`` and its presets, ``SwitchGate``, ``DeepSeekV3Gate``); that costs the router's product a second time.

    - **torch.compile**: recording and replaying are part of the one graph; each of them, and neither, is a graph of its
      own. Token counts may be dynamic: the sizes of decisions become so when they change, as any input's.
    - **torch.export** leaves recording out and refuses to run while replaying.
    - **Activation checkpointing**: what is replayed must stay until the backward is over. Recomputations do not record.
    - A layer that runs several times per forward keeps its last decision; replaying gives each run the same one.
    - **Several ranks**: each records and replays the decisions about its own tokens, with ids among all ``E`` experts;
      those of all ranks, one after the other, are what one rank with the whole batch and all experts replays.
    - **Masked tokens** of a layer are recorded without experts; replayed, a decision about a token that is masked in
      that forward is passed over.

    Args:
        model: any module with ``FMoE`` layers, compiled or not.

    Raises:
        ValueError: the model has no ``FMoE`` layer.  TypeError: ``model`` is not a module.
    Host sync: none.
    Source: replaying rollouts in training: arXiv:2510.11370.

    Example:
        >>> from moeops import FMoETransformerMLP
        >>> layer = FMoETransformerMLP(4, 8, 16)
        >>> replay, x = RoutingReplay(layer), torch.randn(10, 8)
        >>> replay.record()
        >>> y = layer(x)
        >>> decisions = replay.take()
        >>> _ = torch.nn.init.zeros_(layer.gate.gate.weight)
        >>> replay.replay(decisions)
        >>> torch.equal(layer(x), y)
        True
        >>> replay.remove()
    """

    def __init__(self, model: Any) -> None:
        self._watched: dict[str, tuple[FMoE, _Tape]] = {}
        for name, layer in find_layers("RoutingReplay", model).items():
            tape = _Tape()
            add_hook(layer, tape)
            self._watched[name] = (layer, tape)

    def record(self) -> None:
        """Keep the decision of each layer's newest forward from here on."""
        self.stop()
        for _, tape in self._watched.values():
            tape.mode = "record"

    def take(self) -> dict[str, Decision]:
        """Hand over what was recorded since the last call, by layer; layers that did not run are left out."""
        taken = {}
        for name, (_, tape) in self._watched.items():
            recorded = tape.recorded.get()
            if recorded is not None:
                taken[name] = recorded
            tape.recorded.clear()
        return taken

    def replay(self, decisions: Mapping[str, Decision], weights: str = "recorded") -> None:
        """Give every layer's forwards this decision from here on.

        Args:
            decisions: one pair for each layer, as ``take`` returns them.
            weights: ``"recorded"``, or ``"gate"`` for what the gate gives to the recorded experts now.

        Raises:
            ValueError: a layer has no decision, a name is no layer's, or a shape does not fit.  TypeError: a type
            does not fit, or a gate cannot weigh experts that it did not choose.
        """
        op = "RoutingReplay.replay"
        if weights not in WEIGHTS:
            raise ValueError(
                f"{op}: weights must be one of {WEIGHTS}, got {weights!r}. Pick one of them."
            )
        if set(decisions) != set(self._watched):
            missing, unknown = (
                set(self._watched) - set(decisions),
                set(decisions) - set(self._watched),
            )
            raise ValueError(
                f"{op}: decisions must have one entry for each of the {len(self._watched)} layers, got none for "
                f"{sorted(missing)} and some for {sorted(unknown)}. Pass what take() returned."
            )
        for name, (layer, _) in self._watched.items():
            _check_decision(f"{op}: {name}", decisions[name])
            if weights == "gate":
                _check_weighs(f"{op}: {name}", layer.gate)
                _gather_for_weights_at(layer.gate)
        for name, (_, tape) in self._watched.items():
            tape.mode = "replay"
            tape.from_gate = weights == "gate"
            tape.recorded.clear()
            # Constants: a decision that carries gradients would tie two steps together.
            tape.given = (decisions[name][0].detach(), decisions[name][1].detach())

    def stop(self) -> None:
        """Neither record nor replay."""
        for _, tape in self._watched.values():
            tape.mode, tape.given = "off", None
            tape.recorded.clear()

    def remove(self) -> None:
        """Stop, and leave the model as it was."""
        self.stop()
        for layer, tape in self._watched.values():
            remove_hook(layer, tape)


class _Tape(LayerHook):
    """What one layer's gate decided, or shall decide."""

    def __init__(self) -> None:
        self.mode = "off"
        self.from_gate = False
        self.recorded: Newest[Decision] = Newest()
        self.given: Decision | None = None

    def __call__(
        self, layer: FMoE, x: Any, routing: Routing | SlotRouting, mask: Tensor | None = None
    ) -> Routing | SlotRouting | None:
        if self.mode == "record":
            self.recorded.set((routing[0].detach(), routing[1].detach()))
            return None
        if self.given is None:
            return None
        if exporting():
            raise RuntimeError(
                "RoutingReplay: mode must not be replay during torch.export, got a routing, which the program would "
                "hold for ever. Call stop() first."
            )
        first, second = self.given
        if not torch.compiler.is_compiling():
            _check_fits(first, routing)
        torch._check(first.shape[0] == routing[0].shape[0])
        if isinstance(routing, SlotRouting):
            return routing._replace(dispatch_weights=first, combine_weights=second)
        if self.from_gate:
            second = layer.gate.weights_at(x, first)  # type: ignore[operator]  # a BaseGate that has one
        # num_rows stays: it bounds what this gate fills for this many tokens.
        return routing._replace(topk_ids=first, topk_weights=second)


def _gather_for_weights_at(gate: nn.Module) -> None:
    """Have FSDP2 gather the parameters of a gate that is a unit of its own for ``weights_at`` too."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and "weights_at" not in vars(gate):
        fsdp.register_fsdp_forward_method(gate, "weights_at")  # nothing happens to other modules


def _check_decision(op: str, decision: Any) -> None:
    if not isinstance(decision, (tuple, list)) or len(decision) != 2:
        raise TypeError(
            f"{op} must have a pair of tensors, got {_checks.describe(decision)}. Pass what take() returned."
        )
    for index, value in enumerate(decision):
        _checks.check_tensor(op, f"decision[{index}]", value, 2)
    if decision[0].shape != decision[1].shape:
        raise ValueError(
            f"{op} must have two tensors of one shape, got {list(decision[0].shape)} and "
            f"{list(decision[1].shape)}. Pass what take() returned."
        )


def _check_fits(first: Tensor, routing: Routing | SlotRouting) -> None:
    """The decision is one for these tokens and this kind of gate."""
    got = routing[0]
    if first.shape[0] != got.shape[0]:
        raise ValueError(
            f"RoutingReplay: decisions must be for as many tokens as the forward has, got {first.shape[0]} for "
            f"{got.shape[0]}. Replay each batch's own decisions."
        )
    mixes = isinstance(routing, SlotRouting)
    if first.is_floating_point() != mixes:
        raise TypeError(
            f"RoutingReplay: decisions must be of the gate's kind, got {_checks.describe(first)} for a gate that "
            f"{'mixes tokens' if mixes else 'chooses experts'}. Record with the same kind of gate."
        )
    if first.device != got.device:
        raise ValueError(
            f"RoutingReplay: decisions must be on {got.device} like x, got {_checks.describe(first)}. Move them there."
        )


def _check_weighs(op: str, gate: Any) -> None:
    """The gate's own class says which weights its forward gives to given experts."""

    def definer(name: str) -> type | None:
        return next((c for c in type(gate).__mro__ if name in vars(c)), None)

    # A subclass with a forward of its own must say how it weighs: the inherited answer may be another gate's.
    found = definer("weights_at")
    if found is None or found is not definer("forward"):
        raise TypeError(
            f"{op}: the gate must have weights_at beside its forward for weights='gate', got {type(gate).__name__} "
            "without. Write one, or use weights='recorded'."
        )
