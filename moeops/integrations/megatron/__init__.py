"""moeops in Megatron-Core: experts for its MoE layer, and experts in the place of a dense model's MLPs.

.. code-block:: python

    from moeops.integrations.megatron import MoeopsExperts, fmoefy

    spec.submodules.mlp.submodules.experts = ModuleSpec(module=MoeopsExperts)  # Megatron's router and dispatcher
    model = fmoefy(model, num_experts=8)  # or moeops' gate, dispatcher and experts in every layer, before DDP

Groups come from Megatron's ``parallel_state``, and checkpoints have the keys of its own MoE layer with
``SequentialMLP``, so that both load what the other has saved. ``docs/megatron.md`` says what is refused.
"""

try:
    import megatron.core.transformer.moe.moe_layer  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"moeops.integrations.megatron: megatron-core 0.16 or newer must be importable, got {error}. Install it with "
        "pip install megatron-core."
    ) from error

from moeops.integrations.megatron.experts import MoeopsExperts
from moeops.integrations.megatron.layers import MegatronMLP, fmoefy
from moeops.integrations.megatron.parameters import get_groups

__all__ = ["MegatronMLP", "MoeopsExperts", "fmoefy", "get_groups"]
