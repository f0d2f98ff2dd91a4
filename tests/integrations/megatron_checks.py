"""Checks of moeops in Megatron-Core, run by every rank of a group."""

from __future__ import annotations

import itertools
import types

import pytest
import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.activations import quick_gelu, squared_relu
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import (
    _allreduce_non_tensor_model_parallel_grads,
)
from megatron.core.pipeline_parallel.schedules import forward_backward_no_pipelining
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    clear_aux_losses_tracker,
    get_moe_layer_wise_logging_tracker,
)
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron_models import (
    BATCH,
    LAYERS,
    LENGTH,
    VOCABULARY,
    D,
    E,
    H,
    TensorsWhereModelsAre,
    device,
    make_config,
    make_gpt,
    put,
    use_groups,
)

import moeops
from moeops.gates import NaiveGate, SwitchGate
from moeops.integrations.megatron import MegatronMLP, MoeopsExperts, fmoefy
from processes import Ranks

# Groups of two ranks that Megatron calls by these sizes, and of one.
EXPERTS = {"expert_model_parallel_size": 2}
SHARDS = {"tensor_model_parallel_size": 2}
BOTH = {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1, **EXPERTS}
TENSORS = {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
GROUPS = {1: [{}], 2: [EXPERTS, SHARDS, BOTH, TENSORS]}


def tokens(count: int = BATCH) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(VOCABULARY, (count, LENGTH), generator=generator).to(device())


def run(model, ids: torch.Tensor, **options) -> torch.Tensor:
    """The mean loss of a GPT."""
    positions = torch.arange(LENGTH, device=ids.device).expand(ids.shape)
    mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool, device=ids.device).triu(1)
    return model(ids, positions, mask, labels=ids.flip(1), **options).mean()


def stock_gradients(model) -> dict[str, torch.Tensor]:
    """Gradients by name, those of each layer's experts together as moeops has them."""
    found = {}
    for name, parameter in model.named_parameters():
        grad = (
            parameter.grad if getattr(parameter, "main_grad", None) is None else parameter.main_grad
        )
        parts = name.split(".local_experts.")
        if len(parts) == 2:
            rest = parts[1].split(".", 1)[1]
            own = {"linear_fc1": "up", "linear_fc2": "down"}[rest.split(".")[0]]
            name = f"{parts[0]}.{rest.split('.')[1][0]}_{own}"
            found.setdefault(name, []).append(grad)
        else:
            found[name] = grad
    return {k: torch.stack(v) if isinstance(v, list) else v for k, v in found.items()}


def assert_same(actual, expected, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def gated(function, **options) -> dict:
    return {"activation_func": function, "gated_linear_unit": True, **options}


def plain(function, **options) -> dict:
    return {"activation_func": function, "gated_linear_unit": False, **options}


KINDS = {
    "swiglu": gated(F.silu),
    "gelu": plain(F.gelu),
    "squared_relu": plain(squared_relu),
    "geglu": gated(F.gelu),
    "clamped": gated(quick_gelu, activation_func_clamp_value=0.4, glu_linear_offset=1.0),
    "tanh": plain(torch.tanh),
    "shared": gated(F.silu, moe_shared_expert_intermediate_size=8, add_bias_linear=False),
    "padded": gated(
        F.silu,
        moe_token_dispatcher_type="alltoall",
        moe_expert_capacity_factor=0.8,
        moe_pad_expert_input_to_capacity=True,
    ),
    "on_input": gated(
        F.silu, moe_apply_probs_on_input=True, moe_router_topk=1, moe_router_pre_softmax=True
    ),
}


def check_step_equals_that_of_sequential_mlp(ranks: Ranks) -> None:
    """Loss and gradients of a GPT's step, for every activation, dispatcher and way to share experts."""
    kinds = itertools.cycle(KINDS)
    for sizes in GROUPS[ranks.size]:
        use_groups(**sizes)
        # On one rank Megatron's own layers cannot add a bias to experts: autograd refuses their change in place.
        biases = (False, True) if sizes in (EXPERTS, BOTH) else (False,)
        cases = itertools.product(("allgather", "alltoall"), biases)
        picked = [(*case, next(kinds)) for case in cases for _ in range(5 // len(biases))]
        for dispatcher, bias, kind in picked:
            options = {
                "moe_token_dispatcher_type": dispatcher,
                "add_bias_linear": bias,
                **KINDS[kind],
            }
            config = make_config(**options)
            stock, own = make_gpt(config), make_gpt(config, MoeopsExperts)
            for name, parameter in stock.named_parameters():
                if name.endswith("bias"):  # which start with zeros
                    torch.nn.init.normal_(parameter)
            missing = own.load_state_dict(stock.state_dict())
            assert not missing.missing_keys + missing.unexpected_keys
            ids = tokens() + ranks.rank * (config.tensor_model_parallel_size == 1)
            with torch.compiler.set_stance("force_eager"):  # Megatron compiles its activations
                losses = [run(model, ids % VOCABULARY) for model in (stock, own)]
                for loss in losses:
                    loss.backward()
            assert_same(*losses)
            expected = stock_gradients(stock)
            for name, parameter in own.named_parameters():
                assert_same(parameter.grad, expected[name])


def check_start(ranks: Ranks) -> None:
    """On any number of ranks experts start as on one, where those are SequentialMLP's."""
    use_groups()
    stock, whole = (make_gpt(make_config(), experts) for experts in (None, MoeopsExperts))
    layer = whole.decoder.layers[1].mlp.experts
    for e, expert in enumerate(stock.decoder.layers[1].mlp.experts.local_experts):
        assert torch.equal(layer.w_up[e], expert.linear_fc1.weight)
        assert torch.equal(layer.w_down[e], expert.linear_fc2.weight)
    for sizes in GROUPS[ranks.size]:
        use_groups(**sizes)
        for model in (
            make_gpt(make_config(), MoeopsExperts),
            fmoefy(make_gpt(make_config(dense=True)), num_experts=E),
        ):
            experts = model.decoder.layers[0].mlp.experts
            first = parallel_state.get_expert_model_parallel_rank() * experts.w_up.shape[0]
            assert float(experts.w_up.std()) == pytest.approx(0.3, rel=0.1)
            if isinstance(experts, MoeopsExperts):
                own = whole.decoder.layers[0].mlp.experts.w_up
                width = H // parallel_state.get_expert_tensor_parallel_world_size()
                start = parallel_state.get_expert_tensor_parallel_rank() * width
                own = own[first : first + experts.w_up.shape[0]].unflatten(1, (2, H))
                assert torch.equal(experts.w_up, own[:, :, start : start + width].flatten(1, 2))
    config = make_config(perform_initialization=False)
    config.perform_initialization = False
    assert MoeopsExperts(E, config).w_up.shape[1] > 0


def finish_gradients(model) -> None:
    model.finish_grad_sync()
    _allreduce_non_tensor_model_parallel_grads([model], model.config)


def check_data_parallelism(ranks: Ranks) -> None:
    """Megatron's own wrapper sums and divides what it must: N ranks train what one rank trains."""
    use_groups()
    ids = tokens(2 * BATCH)
    reference = make_gpt(make_config(), MoeopsExperts)
    run(reference, ids).backward()
    expected = {name: p.grad for name, p in reference.named_parameters()}
    state = reference.state_dict()
    for sizes, kind in itertools.product(GROUPS[ranks.size], ("spec", "fmoefy")):
        use_groups(**sizes)
        if kind == "spec":
            model = make_gpt(make_config(), MoeopsExperts)
        else:
            # With expert parallelism a configuration must name experts, whatever its model has.
            model = put(fmoefy(make_gpt(make_config(), dense=True), num_experts=E))
            assert model.decoder.layers[0].mlp.d_hidden == H
        config = model.config
        model.load_state_dict({k: own_part(k, v) for k, v in state.items()})
        model = DistributedDataParallel(config, DistributedDataParallelConfig(), model)
        parts = parallel_state.get_data_parallel_world_size()
        run(model, ids.chunk(parts)[parallel_state.get_data_parallel_rank()]).backward()
        finish_gradients(model)
        for name, parameter in model.module.named_parameters():
            name = name.replace("gate.gate.", "router.").replace("gate.", "router.")
            assert_same(parameter.main_grad, own_part(name, expected[name]))


def own_part(name: str, values: torch.Tensor | None) -> torch.Tensor | None:
    """This rank's part of a dense model's weight or gradient, as Megatron cuts it."""
    if values is None:
        return None
    ps = parallel_state
    if ".w_up" in name or ".w_down" in name:
        values = values.chunk(ps.get_expert_model_parallel_world_size())[
            ps.get_expert_model_parallel_rank()
        ]
        size, rank = (
            ps.get_expert_tensor_parallel_world_size(),
            ps.get_expert_tensor_parallel_rank(),
        )
        if ".w_down" in name:
            return values.chunk(size, 2)[rank].contiguous()
        return torch.cat([half.chunk(size, 1)[rank] for half in values.chunk(2, 1)], 1)
    size, rank = ps.get_tensor_model_parallel_world_size(), ps.get_tensor_model_parallel_rank()
    dims = {
        "word_embeddings.weight": 0,
        "output_layer.weight": 0,
        "linear_qkv.weight": 0,
        "linear_proj.weight": 1,
    }
    for end, dim in dims.items():
        if name.endswith(end):
            return values.chunk(size, dim)[rank].contiguous()
    return values


def check_fmoefy_equals_megatrons_layer(ranks: Ranks) -> None:
    """With NaiveGate a dense model becomes what Megatron's MoELayer is, and takes its weights."""
    for sizes in GROUPS[ranks.size][:3]:
        use_groups(**sizes)
        bias = sizes in (EXPERTS, BOTH)
        options = {"add_bias_linear": bias, **plain(F.gelu)}
        stock = make_gpt(make_config(**options))
        dense = make_gpt(make_config(dense=True, **options))
        model = put(fmoefy(dense, num_experts=E, top_k=2, d_hidden=H, gate=NaiveGate))
        assert model is dense
        assert model.config.num_moe_experts == E
        layers = [m.mlp for m in model.modules() if isinstance(m, TransformerLayer)]
        assert [type(layer) for layer in layers] == [MegatronMLP] * LAYERS
        assert [layer.layer_number for layer in layers] == [1, 2]
        assert all(len(list(layer.gate.parameters())) == 1 + bias for layer in layers)
        result = model.load_state_dict(stock.state_dict(), strict=False)
        assert not result.missing_keys
        assert not [key for key in result.unexpected_keys if not key.endswith("_extra_state")]
        ids = tokens()
        losses = [run(m, ids) for m in (stock, model)]
        assert_same(*losses)
        leaves = [m.embedding.word_embeddings.weight for m in (stock, model)]
        grads = [torch.autograd.grad(*pair)[0] for pair in zip(losses, leaves, strict=True)]
        assert_same(*grads)


def check_losses_of_gates(ranks: Ranks) -> None:
    """They enter the backward by Megatron's scaler, in a recomputation too, and its log."""
    use_groups()
    weight, scale = 0.3, 0.25
    ids = (tokens() + ranks.rank) % VOCABULARY
    grads, logged, state = [], [], None
    for recompute in (False, True):
        full = {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
        config = make_config(dense=True, **(full if recompute else {}))
        torch.manual_seed(3)
        options = {"gate": SwitchGate, "top_k": 1, "balance_loss_weight": weight}
        model = put(fmoefy(make_gpt(config), num_experts=E, **options))
        for layer in model.decoder.layers:
            layer.mlp.gate.jitter = None
        state = model.state_dict() if state is None else state
        model.load_state_dict(state)
        MoEAuxLossAutoScaler.set_loss_scale(torch.tensor([scale], device=device()))
        clear_aux_losses_tracker()
        run(model, ids).backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
        logged.append(get_moe_layer_wise_logging_tracker()["load_balancing_loss"]["values"].clone())
    assert moeops.auxiliary_loss(model) == 0
    # By hand: without Megatron's scaler the gates keep their losses.
    for layer in model.decoder.layers:
        layer.mlp.routing_hooks, layer.mlp.gate.loss_scale = (), None
    model.zero_grad()
    model.config.recompute_granularity = None
    loss = run(model, ids)
    own = [layer.mlp.gate.loss for layer in model.decoder.layers]
    (loss + weight * scale * sum(own)).backward()
    for name, parameter in model.named_parameters():
        for found in grads:
            assert_same(found[name], parameter.grad)
    for values in logged:
        assert_same(values.double(), torch.stack(own).detach())
    # In evaluation nothing is logged or kept.
    clear_aux_losses_tracker()
    model.decoder.layers[0].mlp.gate.loss_scale = 1.0
    run(model.eval(), ids)
    assert not get_moe_layer_wise_logging_tracker()["load_balancing_loss"]["values"].any()


def check_schedule(ranks: Ranks) -> None:
    """Megatron's own schedule with two micro-batches, and its scale of the loss: what one backward gives."""
    use_groups()
    weight, scale = 0.3, 8.0
    options = {"gate": SwitchGate, "top_k": 1, "balance_loss_weight": weight}
    model = put(fmoefy(make_gpt(make_config(dense=True)), num_experts=E, **options))
    for layer in model.decoder.layers:
        layer.mlp.gate.switch_eps = 0.0
    model.config.grad_scale_func = lambda loss: loss * scale
    batches = [(tokens() + shift) % VOCABULARY for shift in (0, 3)]

    def step(data, model):
        loss = run(model, next(data))
        return loss, lambda loss: (loss, {})

    with TensorsWhereModelsAre():
        forward_backward_no_pipelining(
            forward_step_func=step,
            data_iterator=iter(batches),
            model=[model],
            num_microbatches=2,
            seq_length=LENGTH,
            micro_batch_size=BATCH,
            forward_only=False,
        )
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for layer in model.decoder.layers:
        layer.mlp.routing_hooks, layer.mlp.gate.loss_scale = (), None
    for ids in batches:
        loss = run(model, ids)
        (scale / 2 * (loss + weight * moeops.auxiliary_loss(model))).backward()
    for name, parameter in model.named_parameters():
        assert_same(found[name], parameter.grad)


def check_marks_and_padding(ranks: Ranks) -> None:
    for sizes in GROUPS[ranks.size]:
        use_groups(**sizes)
        model = fmoefy(make_gpt(make_config(dense=True)), num_experts=E)
        layer = model.decoder.layers[0].mlp.to(device())
        elsewhere = sizes in (EXPERTS, BOTH, TENSORS)
        for expert in (
            layer.experts,
            make_gpt(make_config(), MoeopsExperts).decoder.layers[0].mlp.experts,
        ):
            marks = {(p.allreduce, p.tensor_model_parallel) for p in expert.parameters()}
            assert marks == {(not elsewhere, True)}
            assert (expert.w_up.partition_dim, expert.w_up.partition_stride) == (1, 2)
        tensors = "tensor_model_parallel_size" in sizes
        assert [p.sequence_parallel for p in layer.gate.parameters()] == [tensors]
        x = torch.randn(LENGTH, BATCH, D, device=device())
        padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool, device=device())
        padding[0, 4:] = True
        y, bias = layer(x, padding_mask=padding)
        whole = layer(x)[0]
        assert bias is None
        assert not y[4:, 0].any()
        assert_same(
            y.masked_fill(padding.t()[..., None], 0), whole.masked_fill(padding.t()[..., None], 0)
        )


def check_lines_of_fastmoes_readme(ranks: Ranks) -> None:
    """Both versions' calls give every rank as many experts as they say."""
    from moeops.integrations import fmoe

    fmoe.install()
    from fmoe.megatron import fmoefy as of_fastmoe

    sizes = EXPERTS if ranks.size == 2 else {}
    use_groups(**sizes)
    ids = tokens()
    for name in ("num_experts", "fmoe_num_experts"):
        model = put(of_fastmoe(make_gpt(make_config(dense=True)), **{name: 2}))
        for layer in model.decoder.layers:
            assert (layer.mlp.num_expert, layer.mlp.tot_expert) == (2, 2 * ranks.size)
            assert (layer.mlp.d_hidden, layer.mlp.top_k) == (H // 2, 2)
            assert layer.mlp.balance_loss_weight == 1
        run(model, ids).backward()
        assert all(p.grad is not None for p in model.parameters())
    dense = make_gpt(make_config(dense=True))
    with pytest.raises(ValueError, match=r"fmoe_num_experts must be given"):
        of_fastmoe(dense)
    with pytest.raises(ValueError, match=r"megatron_version must be None, got 'v2\.2'"):
        of_fastmoe(dense, 2, megatron_version="v2.2")
    if ranks.size == 2:
        with pytest.raises(ValueError, match=r"distributed_experts must be True with the 2 ranks"):
            of_fastmoe(dense, 2, distributed_experts=False)


def check_errors(ranks: Ranks) -> None:
    use_groups()
    config = make_config()
    for name, value, text in (
        ("fp8", "hybrid", r"fp8 must not be set .* got 'hybrid'\. Leave fp8 out"),
        ("use_te_activation_func", True, r"use_te_activation_func must not be set"),
        ("offload_modules", ["core_attn", "moe_act"], r"offload_modules .* got \['moe_act'\]"),
    ):
        options = types.SimpleNamespace(**{**vars(config), name: value})
        with pytest.raises(NotImplementedError, match=text):
            MoeopsExperts(E, options)
    options = {
        **vars(config),
        "recompute_granularity": "selective",
        "recompute_modules": ["moe_act"],
    }
    MoeopsExperts(E, types.SimpleNamespace(**options))
    with pytest.raises(NotImplementedError, match=r"got \['moe_act'\]\. Recompute the whole layer"):
        MoeopsExperts(E, types.SimpleNamespace(**{**options, "activation_func": torch.tanh}))
    dense = make_gpt(make_config(dense=True))
    with pytest.raises(ValueError, match=r"must have TransformerLayers with an MLP, got GPTModel"):
        fmoefy(make_gpt(config), num_experts=E)
    wrapped = DistributedDataParallel(dense.config, DistributedDataParallelConfig(), dense)
    with pytest.raises(ValueError, match=r"must not be wrapped yet, got DistributedDataParallel"):
        fmoefy(wrapped, num_experts=E)
    with pytest.raises(ValueError, match=r"num_experts must be at least 1"):
        fmoefy(dense, num_experts=0)
    with pytest.raises(ValueError, match=r"activation_func must be .*silu"):
        fmoefy(make_gpt(make_config(dense=True, **gated(F.gelu))), num_experts=E)
    dense.decoder.layers[1].mlp.linear_fc1.layer_norm_weight = torch.ones(D)
    with pytest.raises(ValueError, match=r"norm must be its pre_mlp_layernorm, got one inside"):
        fmoefy(dense, num_experts=E)
    assert not isinstance(dense.decoder.layers[0].mlp, MegatronMLP)
    if ranks.size == 2:
        use_groups(**EXPERTS)
        with pytest.raises(
            ValueError, match=r"num_experts must be a multiple of the 2 ranks .* got 3"
        ):
            fmoefy(make_gpt(make_config(dense=True)), num_experts=3)
        use_groups(**SHARDS)
        with pytest.raises(ValueError, match=r"add_bias_linear must be False .* got True and 2"):
            fmoefy(make_gpt(make_config(dense=True, add_bias_linear=True)), num_experts=E)
        with pytest.raises(
            ValueError, match=r"moe_ffn_hidden_size must be a multiple of the 2 .* got 9"
        ):
            MoeopsExperts(
                E, types.SimpleNamespace(**{**vars(make_config()), "moe_ffn_hidden_size": 9})
            )
        model = fmoefy(make_gpt(make_config(dense=True)), num_experts=E)
        model.config.sequence_parallel = False
        with pytest.raises(ValueError, match=r"sequence_parallel must be True to train with the 2"):
            model.decoder.layers[0].mlp(torch.ones(2, 1, D))


def check_half_types(ranks: Ranks) -> None:
    """In bfloat16 as near to float64 as Megatron's experts are."""
    use_groups()
    counts = torch.tensor([5, 0, 9, 4], device=device())
    x, probs = torch.randn(18, D, device=device()), torch.rand(18, device=device())
    errors = {}
    for experts in (None, MoeopsExperts):
        layer = make_gpt(make_config(), experts).decoder.layers[0].mlp.experts
        results = []
        for dtype in (torch.float64, torch.bfloat16):
            layer.to(dtype).zero_grad()
            y, _ = layer(x.to(torch.bfloat16).to(dtype), counts, probs)
            assert y.dtype == dtype
            y.square().sum().backward()
            grads = [p.grad.double().norm() for p in layer.parameters()]
            results.append((y.double(), torch.stack(grads).norm()))
        (exact, grad), (near, other) = results
        errors[experts] = (
            float((near - exact).norm() / exact.norm()),
            float(abs(1 - other / grad)),
        )
    for own, stock in zip(errors[MoeopsExperts], errors[None], strict=True):
        assert own <= 1.5 * stock + 1e-3 < 0.05, errors


def check_chunks_and_compilation(ranks: Ranks) -> None:
    """The chunks of a virtual pipeline; the experts in one graph, with rows of any number."""
    use_groups()
    chunks = [make_gpt(make_config(dense=True)) for _ in range(2)]
    assert fmoefy(chunks, num_experts=E) is chunks
    assert all(isinstance(layer.mlp, MegatronMLP) for m in chunks for layer in m.decoder.layers)
    if ranks.size > 1:
        return
    for kind in ("swiglu", "geglu"):
        experts = MoeopsExperts(E, make_config(**KINDS[kind])).to(device())
        compiled = torch.compile(experts, backend="aot_eager", fullgraph=True)
        for counts in ([3, 0, 2, 4], [1, 1, 4, 1], [0, 0, 0, 0]):
            rows = sum(counts)
            counts = torch.tensor(counts, device=device())
            x, probs = torch.randn(rows, D, device=device()), torch.rand(rows, device=device())
            for actual, expected in zip(
                *(f(x, counts, probs) for f in (compiled, experts)), strict=True
            ):
                if expected is not None:
                    assert_same(actual, expected)
            if not counts.any():
                experts(x, counts, probs)[0].sum().backward()
                assert not any(p.grad.any() for p in experts.parameters())
