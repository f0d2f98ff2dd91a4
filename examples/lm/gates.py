"""Every gate of moeops by the name that ``--gate`` takes. Imports neither torch nor moeops, so that --help is quick."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sizes:
    """What a gate's options may depend on."""

    experts: int
    top_k: int
    d_model: int
    context: int


@dataclass(frozen=True)
class GateSpec:
    """How this example uses a gate.

    Attributes:
        cls: class in ``moeops.gates``.
        top_k: the only number of experts per token that it knows, None for any.
        options: its keyword arguments.
        causal: ``"yes"``; ``"evaluation"`` if a token's experts depend on later tokens in training only; ``"no"`` if
            always, so that the model sees what it shall predict and its held-out loss says nothing.
        varies: the number of experts per token does, so that an empty slot is not a dropped one.
        note: one line for --help.
    """

    cls: str
    top_k: int | None = None
    options: Callable[[Sizes], dict[str, Any]] = lambda sizes: {}
    causal: str = "yes"
    varies: bool = False
    note: str = ""


def _always(**options: Any) -> Callable[[Sizes], dict[str, Any]]:
    return lambda sizes: options


def _two_groups(sizes: Sizes) -> dict[str, Any]:
    return {"num_groups": 2 if sizes.experts % 2 == 0 else 1}


# The routers of published models come with a balance loss here; deepseek's bias does that work instead.
BALANCED = _always(balance=True)
GATES = {
    "naive": GateSpec("NaiveGate"),
    "switch": GateSpec("SwitchGate", top_k=1),
    "gshard": GateSpec("GShardGate", top_k=2),
    "noisy": GateSpec("NoisyGate"),
    "topk": GateSpec("TopKGate", options=BALANCED),
    "mixtral": GateSpec("MixtralGate", options=BALANCED),
    "qwen3": GateSpec("Qwen3Gate", options=BALANCED),
    "gpt-oss": GateSpec("GptOssGate", options=BALANCED),
    "deepseek": GateSpec("DeepSeekV3Gate", options=_always(scale=2.5)),
    "llama4": GateSpec("Llama4Gate", options=BALANCED),
    "sigmoid": GateSpec("SigmoidGate", options=BALANCED),
    "xmoe": GateSpec("XMoEGate", options=lambda s: {"proj_dim": s.d_model // 2, "balance": True}),
    "threshold": GateSpec(
        "ThresholdGate",
        options=_always(top_p=0.4, balance=True, dynamic=0.01),
        varies=True,
        note="top-p: at most --top-k experts",
    ),
    "remoe": GateSpec(
        "ReMoEGate", options=BALANCED, varies=True, note="--top-k experts on average"
    ),
    "dense-to-sparse": GateSpec(
        "DenseToSparseGate",
        options=BALANCED,
        varies=True,
        note="at most --top-k experts, annealed to one",
    ),
    "ktop1": GateSpec("KTop1Gate"),
    "sam": GateSpec("SAMGate", options=_two_groups),
    "base": GateSpec(
        "BASEGate",
        top_k=1,
        causal="evaluation",
        note="in training a token's expert depends on the whole batch",
    ),
    "hash": GateSpec("HashGate", options=_always(num_buckets=256), note="by byte value"),
    "tutel": GateSpec("TutelGate"),
    "deepspeed": GateSpec("DeepSpeedGate"),
    "expert-choice": GateSpec(
        "ExpertChoiceGate",
        causal="no",
        note="not causal: experts choose among all tokens of the batch",
    ),
    "soft": GateSpec(
        "SoftMoEGate",
        # As many slots as the other gates have pairs: the experts do the same work.
        options=lambda s: {
            "num_slots": max(1, s.context * s.top_k // s.experts),
            "sequence_length": s.context,
        },
        causal="no",
        note="not causal: experts see mixtures of all tokens of a sequence",
    ),
    "dc": GateSpec("DCGate", top_k=2, note="gshard, where there is one rank"),
    "swipe": GateSpec("SwipeGate", note="naive, where there is one rank"),
    "faster": GateSpec("FasterGate", note="topology-aware; there is one node"),
    "zero": GateSpec("ZeroGate", note="no routing: every token to expert 0"),
    "forced-balance": GateSpec("ForcedBalanceGate", note="no routing: experts in turn"),
}


def default_top_k(gate: str, experts: int) -> int:
    """Experts per token where the user names none."""
    return GATES[gate].top_k or min(2, experts)


def help_text() -> str:
    """What --help says about the gates that need a word."""
    lines = [f"{name}: {spec.note}" for name, spec in GATES.items() if spec.note]
    return "; ".join(lines)


def warning(gate: str) -> str | None:
    """What a user of the gate must know before reading the losses."""
    causal = GATES[gate].causal
    if causal == "no":
        return (
            f"warning: the {gate} gate is not causal: tokens see later ones through it. Its losses are not comparable "
            "with those of other gates, and the text it generates is not what it was trained for."
        )
    if causal == "evaluation":
        return (
            f"warning: in training the {gate} gate chooses by the whole batch. Its training loss is not comparable "
            "with that of other gates; the held-out loss is."
        )
    return None
