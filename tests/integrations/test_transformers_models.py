"""Whole transformers models on moeops' experts: every way to ask for them, and what the models do with them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import moeops

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "num_experts": 6,
    "num_experts_per_tok": 2,
}


@pytest.fixture(scope="module", autouse=True)
def registered():
    import moeops.integrations.transformers  # noqa: F401


def make_model(implementation: str = "moeops", **options):
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**{**SIZES, **options})
    return transformers.AutoModelForCausalLM.from_config(
        config, experts_implementation=implementation
    )


def token_ids(rows: int = 2, columns: int = 7) -> torch.Tensor:
    return torch.randint(SIZES["vocab_size"], (rows, columns))


def gradients(model, ids):
    model.zero_grad()
    loss = model(ids, labels=ids).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}


def implementations(model):
    from moeops.integrations.transformers import explain

    return [report.implementation for report in explain(model)]


def test_ways_to_ask_for_moeops(tmp_path):
    model = make_model()
    assert implementations(model) == ["moeops"] * 2
    model.set_experts_implementation("eager")
    assert implementations(model) == ["eager"] * 2
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, experts_implementation="moeops"
    )
    assert implementations(loaded) == ["moeops"] * 2
    ids = token_ids()
    model.set_experts_implementation("moeops")
    assert torch.equal(model(ids).logits, loaded(ids).logits)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, loaded.get_parameter(name)), name


def test_a_model_within_a_model():
    config = transformers.Qwen3VLMoeConfig(
        text_config={**SIZES, "rope_scaling": {"rope_type": "default", "mrope_section": [2, 2, 2]}},
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "num_heads": 2,
            "intermediate_size": 16,
            "out_hidden_size": SIZES["hidden_size"],
            "deepstack_visual_indexes": [0],
        },
    )
    model = transformers.Qwen3VLMoeForConditionalGeneration(config)
    model.set_experts_implementation("moeops")
    assert implementations(model) == ["moeops"] * 2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_step(checkpointing):
    model, ids = make_model("eager"), token_ids()
    expected = gradients(model, ids)
    model.set_experts_implementation("moeops")
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.train()
    for name, value in gradients(model, ids).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_compiled_training_step(fresh_dynamo):
    model = make_model(num_hidden_layers=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for columns in (7, 9):
        ids = token_ids(columns=columns)
        expected = gradients(model, ids)
        for name, value in gradients(compiled, ids).items():
            name = name.removeprefix("_orig_mod.")
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_generation_with_a_static_cache():
    ids, tokens = token_ids(), []
    for implementation in ("eager", "moeops"):
        model = make_model(implementation).eval()
        tokens.append(
            model.generate(
                ids,
                max_new_tokens=6,
                do_sample=False,
                cache_implementation="static",
                pad_token_id=0,
            )
        )
    assert torch.equal(*tokens)


def test_registering_twice_changes_nothing():
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    from moeops.integrations.transformers import experts, register

    before = set(ALL_EXPERTS_FUNCTIONS)
    register()
    assert set(ALL_EXPERTS_FUNCTIONS) == before
    assert ALL_EXPERTS_FUNCTIONS["moeops"] is experts.moeops_experts


def test_the_library_below_imports_no_other_project():
    """The floors of the layout keep moeops.integrations out of the others' imports; this keeps the projects out."""
    library = Path(moeops.__file__).parent
    wanted = re.compile(r"^\s*(?:import|from) (?:transformers|peft|torchtitan)\b", re.MULTILINE)
    files = [f for f in library.rglob("*.py") if wanted.search(f.read_text())]
    assert files
    assert {f.relative_to(library).parts[0] for f in files} == {"integrations"}


@pytest.mark.parametrize(
    ("version", "wanted"),
    [("5.7.2", "got 5.7.2"), ("4.57.0.dev0", "got 4.57.0.dev0"), (None, "got none")],
)
def test_other_versions_of_transformers(version, wanted, monkeypatch):
    import importlib.metadata

    from moeops.integrations.transformers._version import require_transformers

    def installed(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)
    with pytest.raises(ImportError, match=f"must be .*5.8 or newer.*{wanted}"):
        require_transformers()


def test_the_oldest_version_is_accepted(monkeypatch):
    import importlib.metadata

    from moeops.integrations.transformers._version import require_transformers

    for version in ("5.8.0", "5.10.0.dev0", "6.0"):
        monkeypatch.setattr(importlib.metadata, "version", lambda name, v=version: v)
        require_transformers()
