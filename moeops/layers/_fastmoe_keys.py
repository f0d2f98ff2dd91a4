"""FastMoE's names of an MLP's expert weights, read into fused ones. E experts, D model width, H hidden width."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

# By the names of FusedExperts; an expert of its own has weights [1, H, D] and biases [1, H].
FASTMOE_NAMES = {
    "w_up": "htoh4.weight",
    "b_up": "htoh4.bias",
    "w_down": "h4toh.weight",
    "b_down": "h4toh.bias",
}


def fused_names(state: dict[str, Any], prefix: str, num_expert: int) -> tuple[list[str], list[str]]:
    """Rename what FastMoE's layer has saved to the names of ``FusedExperts``, in place.

    Both of its layouts are read: one tensor ``htoh4.weight [E, H, D]`` for all experts, as in version 0.2, and
    ``0.htoh4.weight [1, H, D]``, one for each, as from version 1.0 on.

    Args:
        state: a state dict; other entries stay as they are.
        prefix: of the experts' names in it.
        num_expert: ``E``.

    Returns:
        The new names, without the prefix, and errors for what does not fit.
    """
    renamed, errors = [], []
    for name, key in FASTMOE_NAMES.items():
        if prefix + name in state:
            continue
        found: Tensor | None = state.pop(prefix + key, None)
        if found is None:
            pattern = re.compile(re.escape(prefix) + r"(\d+)\." + re.escape(key))
            matches = [match for match in map(pattern.fullmatch, list(state)) if match]
            if not matches:
                continue
            parts = {int(match[1]): state.pop(match[0]) for match in matches}
            if sorted(parts) != list(range(num_expert)):
                errors.append(
                    f"{prefix}*.{key} must be there for the experts 0 to {num_expert - 1}, got {sorted(parts)}. Load "
                    "the file into a layer with as many experts on this rank."
                )
                continue
            found = torch.cat([parts[index] for index in range(num_expert)])
        state[prefix + name] = found
        renamed.append(name)
    return renamed, errors
