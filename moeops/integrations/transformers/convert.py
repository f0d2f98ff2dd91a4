"""Parameters of transformers' experts to those of moeops' layers, and back. E experts, D width, H hidden width.

``FMoETransformerMLP(E, D, H, activation="swiglu", gate=Qwen3Gate, gate_bias=False, bias=False)`` has what a layer of
Qwen3-MoE, Mixtral or OLMoE has, under other names. These functions rename, and change the layout where it differs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

State = dict[str, Tensor]

# Of fused experts, by moeops' names; those of experts without a gate come second.
_FUSED = {
    "w_up": ("gate_up_proj", "up_proj"),
    "b_up": ("gate_up_proj_bias", "up_proj_bias"),
    "w_down": ("down_proj",),
    "b_down": ("down_proj_bias",),
}
_OURS = {theirs: ours for ours, names in _FUSED.items() for theirs in names}
_IN_FUSED = re.compile(r"((?:.*\.)?experts\.)(" + "|".join(_OURS) + ")")
# Of files, in which each expert has its own: Qwen's and DeepSeek's names, Mixtral's.
_PROJECTIONS = {"gate_proj": 0, "up_proj": 1, "down_proj": 2, "w1": 0, "w3": 1, "w2": 2}
_OF_ONE = re.compile(r"((?:.*\.)?experts\.)(\d+)\.(" + "|".join(_PROJECTIONS) + r")\.weight")
_ROUTER = re.compile(r"((?:.*\.)?)(?:gate|router)\.(weight|bias)")
_OUR_ROUTER = re.compile(r"((?:.*\.)?)gate\.gate\.(weight|bias)")


def from_transformers(
    state: Mapping[str, Tensor], *, transposed: bool = False, interleaved: bool = False
) -> State:
    """Rename what a layer or a model of transformers has, so that a model with moeops' layers in its place loads it.

    Args:
        state: a state dict of transformers, or the tensors of a model's files, where each expert has its own.
        transposed: weights of fused experts are ``[E, in, out]``, as in gpt-oss (an experts module of transformers says
            so in ``is_transposed``).
        interleaved: gate and up rows alternate, as in gpt-oss (``is_concatenated`` is false there).

    Returns:
        ``experts.w_up`` and so on, and ``gate.gate.weight`` for a router ``gate.weight`` or ``router.weight`` beside
        experts. Other names stay. Tensors share memory with ``state`` where they can.

    Raises:
        ValueError: an expert of a list lacks a projection.

    Example:
        >>> state = {"mlp.gate.weight": torch.ones(2, 1), "mlp.experts.down_proj": torch.ones(2, 1, 3)}
        >>> {name: list(value.shape) for name, value in from_transformers(state).items()}
        {'mlp.gate.gate.weight': [2, 1], 'mlp.experts.w_down': [2, 1, 3]}
    """
    layers = {found[1].removesuffix("experts.") for name in state if (found := _place(name))}
    single: dict[str, dict[int, dict[int, Tensor]]] = {}
    converted: State = {}
    for name, value in state.items():
        if match := _OF_ONE.fullmatch(name):
            experts = single.setdefault(match[1], {})
            experts.setdefault(int(match[2]), {})[_PROJECTIONS[match[3]]] = value
        elif match := _IN_FUSED.fullmatch(name):
            ours = _OURS[match[2]]
            if transposed and ours.startswith("w_"):
                value = value.transpose(1, 2)
            if interleaved and match[2].startswith("gate_up"):
                value = torch.cat((value[:, 0::2], value[:, 1::2]), 1)
            converted[match[1] + ours] = value
        elif (match := _ROUTER.fullmatch(name)) and match[1] in layers:
            converted[f"{match[1]}gate.gate.{match[2]}"] = value
        else:
            converted[name] = value
    for place, experts in single.items():
        converted |= _join(place, experts)
    return converted


def to_transformers(
    state: Mapping[str, Tensor],
    *,
    transposed: bool = False,
    interleaved: bool = False,
    gated: bool = True,
    router: str = "gate",
) -> State:
    """Do the inverse of ``from_transformers``, with fused experts.

    Args:
        state: a state dict of ``FMoETransformerMLP``, or of a model with such layers.
        transposed: as there.
        interleaved: as there.
        gated: ``w_up`` holds gate rows, then up rows.
        router: what the router is called, "gate" or "router".

    Returns:
        The names that transformers' modules have. (Its ``save_pretrained`` writes one tensor per expert of them.)

    Example:
        >>> list(to_transformers({"experts.w_up": torch.ones(1, 2, 1), "gate.gate.weight": torch.ones(1, 1)}))
        ['experts.gate_up_proj', 'gate.weight']
    """
    ours = re.compile(r"((?:.*\.)?experts\.)(" + "|".join(_FUSED) + ")")
    converted: State = {}
    for name, value in state.items():
        if match := ours.fullmatch(name):
            if interleaved and gated and match[2].endswith("up"):
                value = torch.stack(value.chunk(2, 1), 2).flatten(1, 2)
            if transposed and match[2].startswith("w_"):
                value = value.transpose(1, 2)
            theirs = _FUSED[match[2]]
            converted[match[1] + theirs[0 if gated else -1]] = value
        elif match := _OUR_ROUTER.fullmatch(name):
            converted[f"{match[1]}{router}.{match[2]}"] = value
        else:
            converted[name] = value
    return converted


def _place(name: str) -> re.Match[str] | None:
    return _IN_FUSED.fullmatch(name) or _OF_ONE.fullmatch(name)


def _join(place: str, experts: dict[int, dict[int, Tensor]]) -> State:
    """One tensor per projection; gate rows come before up rows."""
    every = experts[min(experts)].keys()
    for expert in range(len(experts)):
        if experts.get(expert, {}).keys() != every:
            raise ValueError(
                f"from_transformers: all experts must have the same projections, got others for {place}{expert} than "
                f"for {place}{min(experts)}. Pass the tensors of all files of the model."
            )
    ordered = [experts[expert] for expert in range(len(experts))]
    up = [torch.cat([one[half] for half in (0, 1) if half in one]) for one in ordered]
    return {
        f"{place}w_up": torch.stack(up),
        f"{place}w_down": torch.stack([one[2] for one in ordered]),
    }
