"""Layers: nn.Modules that compose gates and ops and own no maths."""

from moeops.layers.experts import FusedExperts
from moeops.layers.linear import FMoELinear
from moeops.layers.moe import FMoE
from moeops.layers.shared import SharedExpertGate, SharedMLP
from moeops.layers.transformer import FMoETransformerMLP

__all__ = [
    "FMoE",
    "FMoELinear",
    "FMoETransformerMLP",
    "FusedExperts",
    "SharedExpertGate",
    "SharedMLP",
]
