"""moeops inside other projects' code. Nothing here is imported by ``import moeops``: import the module you need.

- ``moeops.integrations.fmoe``: stands in for FastMoE, so that programs written for ``fmoe`` run.
- ``moeops.integrations.transformers``: moeops as the experts of Hugging Face transformers' models.
- ``moeops.integrations.peft``: LoRA on those experts, without a tensor of the size of their weights.
- ``moeops.integrations.megatron``: experts in Megatron-Core, by its MoE layer or in the place of MLPs.
- ``moeops.integrations.torchtitan``: overrides for torchtitan's experts.
"""
