"""Megatron-Core's models for checks, on GPUs with NCCL and on CPUs with gloo, where CUDA is answered for."""

from __future__ import annotations

import contextlib
import functools
import queue
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import random
from megatron.core.transformer import torch_norm
from megatron.core.transformer.moe import moe_utils, token_dispatcher
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.overrides import TorchFunctionMode

E, D, H, LAYERS, VOCABULARY, LENGTH, BATCH = 4, 16, 24, 2, 32, 6, 2


def on_cpu(tensor, as_numpy: bool = False, record_stream: bool = False):
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


def device() -> str:
    """Where the models of this process are: its groups say it."""
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def put(model: torch.nn.Module) -> torch.nn.Module:
    return model.double().to(device())


class TensorsWhereModelsAre(TorchFunctionMode):
    """What is asked for on "cuda", as Megatron's schedules do, is made where the models are."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = device()
        return func(*args, **kwargs)


def make_norm(cls, config, hidden_size: int, eps: float = 1e-5, **_) -> torch.nn.LayerNorm:
    norm = torch.nn.LayerNorm(hidden_size, eps)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel
    return norm


def pretend_that_the_cpu_is_a_gpu() -> None:
    torch.cuda.current_device = lambda: "cpu"
    torch.cuda.Stream = mock.MagicMock()
    torch.cuda.current_stream = mock.MagicMock()
    torch.cuda.stream = lambda _: contextlib.nullcontext()
    torch.cuda.synchronize = lambda *_: None
    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda *_, **__: None
    token_dispatcher.maybe_move_tensor_to_cpu = on_cpu


@functools.cache
def prepare() -> None:
    """Change Megatron-Core so that it runs here, once in a process that has a group."""
    if device() == "cpu":
        pretend_that_the_cpu_is_a_gpu()
    random.initialize_rng_tracker(inference_rng_tracker=True)
    # Without TransformerEngine Megatron-Core 0.16 leaves this name undefined.
    moe_utils.te_general_gemm = None
    # What has been written is told in this process; Megatron's queue is another process, which imports torch.
    results: queue.Queue = queue.Queue()
    filesystem_async._get_write_results_queue = lambda: results
    # Norms that know of sequence parallelism come with Apex or TransformerEngine.
    torch_norm.WrappedTorchNorm.__new__ = make_norm


_known: dict[tuple, dict] = {}


def use_groups(**sizes: int) -> None:
    """The groups of ``parallel_state`` for these sizes, in the place of those before. They are made once."""
    prepare()
    place = tuple(sorted(sizes.items()))
    if place not in _known:
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False, **sizes)
        names = [name for name in vars(parallel_state) if name.isupper() and name[0] == "_"]
        _known[place] = {name: getattr(parallel_state, name) for name in names}
    vars(parallel_state).update(_known[place])


def make_config(**options) -> TransformerConfig:
    sizes = {
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        "expert_tensor_parallel_size": parallel_state.get_expert_tensor_parallel_world_size(),
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "num_moe_experts": E,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": H,
    }
    if options.pop("dense", False):
        sizes = {"tensor_model_parallel_size": sizes["tensor_model_parallel_size"]}
    sizes["sequence_parallel"] = sizes["tensor_model_parallel_size"] > 1
    usual = {
        "num_layers": LAYERS,
        "hidden_size": D,
        "ffn_hidden_size": H,
        "num_attention_heads": 2,
        "use_cpu_initialization": True,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method_std": 0.3,
    }
    return TransformerConfig(**{**usual, **sizes, **options})


def make_gpt(
    config: TransformerConfig, experts: type | None = None, dense: bool = False
) -> GPTModel:
    """A GPT with Megatron's MoE layers, or moeops' experts in them, or dense ones, from one seed."""
    num_experts = None if dense else config.num_moe_experts
    spec = get_gpt_layer_local_spec(num_experts=num_experts, moe_grouped_gemm=False)
    if experts is not None:
        spec.submodules.mlp.submodules.experts = ModuleSpec(module=experts)
    torch.manual_seed(5)
    return put(
        GPTModel(config, spec, VOCABULARY, LENGTH, share_embeddings_and_output_weights=False)
    )
