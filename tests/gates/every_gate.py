"""Every gate of the library with options that make it count, drop, draw or remember something."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from moeops.gates import (
    BASEGate,
    DCGate,
    DeepSeekV3Gate,
    DeepSpeedGate,
    DenseToSparseGate,
    ExpertChoiceGate,
    FasterGate,
    ForcedBalanceGate,
    GptOssGate,
    GShardGate,
    HashGate,
    KTop1Gate,
    Llama4Gate,
    MixtralGate,
    NaiveGate,
    NoisyGate,
    Qwen3Gate,
    ReMoEGate,
    SAMGate,
    SigmoidGate,
    SoftMoEGate,
    SwipeGate,
    SwitchGate,
    ThresholdGate,
    TopKGate,
    TutelGate,
    XMoEGate,
    ZeroGate,
)


class Case(NamedTuple):
    """A gate for a layer.

    Attributes:
        build: called as ``build(d_model, num_expert, world_size, top_k)``.
        top_k: ``K``.
        draws: training draws random numbers, once.
        places: choices or losses depend on the tokens' places, and not on their order alone.
    """

    build: partial
    top_k: int = 2
    draws: bool = False
    places: bool = False


def case(cls, top_k=2, draws=False, places=False, **options):
    return Case(partial(cls, **options), top_k, draws, places)


GATES = {
    "naive": case(NaiveGate),
    "topk_sigmoid": case(TopKGate, score="sigmoid", scale=2.5, balance=True),
    "sigmoid": case(SigmoidGate, balance=True),
    "mixtral": case(MixtralGate, balance=True),
    "qwen3": case(Qwen3Gate, balance=True, renormalize=False),
    "gpt_oss": case(GptOssGate, balance=True),
    "llama4": case(Llama4Gate, balance=True),
    "xmoe": case(XMoEGate, proj_dim=5, balance=True),
    "switch": case(SwitchGate, 1, switch_eps=0.0, capacity=1.0),
    "switch_jitter": case(SwitchGate, 1, draws=True, jitter="logits"),
    "switch_compat": case(
        SwitchGate, 1, switch_eps=0.0, drop_policy="priority", capacity=0.8, compat=True
    ),
    "gshard": case(GShardGate, capacity=0.8, random_routing=False),
    "gshard_batch": case(GShardGate, capacity=0.7, random_routing=False, drop_policy="batch"),
    "gshard_random": case(GShardGate, draws=True),
    "gshard_lottery": case(
        GShardGate, draws=True, random_routing=False, drop_policy="random", capacity=0.7
    ),
    "gshard_compat": case(GShardGate, capacity=0.3, compat=True, draws=True),
    "dc": case(DCGate, capacity=0.8, random_routing=False),
    "deepspeed_1": case(DeepSpeedGate, 1, use_rts=False, capacity=0.6, min_capacity=2),
    "deepspeed_2": case(DeepSpeedGate, draws=True, min_capacity=1),
    "deepspeed_3": case(DeepSpeedGate, 3, capacity=0.7, min_capacity=1),
    "tutel": case(TutelGate, capacity=0.6, alignment=2),
    "tutel_batch": case(TutelGate, capacity=-0.6, drop_policy="batch"),
    "tutel_load": case(TutelGate, draws=True, gate_noise=1.0, balance="load", capacity=None),
    "noisy": case(NoisyGate, draws=True, capacity=1.2),
    "noisy_gshard": case(NoisyGate, draws=True, min_noise=0.0, balance="gshard"),
    "ktop1": case(KTop1Gate, capacity=0.7),
    "sam": case(SAMGate, num_groups=3, capacity=0.8),
    "sam_compat": case(SAMGate, num_groups=2, compat=True),
    "dense_to_sparse": case(DenseToSparseGate, 4, draws=True, balance=True),
    "threshold": case(ThresholdGate, 4, balance=True, dynamic=0.1, top_p=0.7, row_budget=1.5),
    "remoe": case(ReMoEGate, row_budget=1.5, coefficient=0.5),
    "remoe_best": case(ReMoEGate, balance=False, max_k=3, coefficient=0.5),
    "expert_choice": case(ExpertChoiceGate, capacity=0.8),
    "base": case(BASEGate, 1),
    "soft": case(SoftMoEGate, num_slots=2),
    "soft_sequences": case(SoftMoEGate, places=True, sequence_length=8),
    "deepseek": case(DeepSeekV3Gate, num_groups=3, top_groups=2, scale=2.5),
    "deepseek_sequences": case(DeepSeekV3Gate, places=True, sequence_length=8),
    "hash": case(HashGate, key="feature", num_buckets=16),
    "hash_position": case(HashGate, places=True, key="position", num_buckets=16),
    "swipe": case(SwipeGate),
    "faster": case(FasterGate),
    "zero": case(ZeroGate),
    "forced_balance": case(ForcedBalanceGate),
    "forced_balance_gate": case(ForcedBalanceGate, gate=partial(TopKGate, balance=True)),
}
