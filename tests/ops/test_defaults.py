"""Bare ops are for people: options by name, with the defaults of the public functions, as docs/ops.md says."""

from __future__ import annotations

import inspect
import io
import re
from pathlib import Path

import pytest
import torch
from torch.utils import _pytree

import moeops
import moeops.ops
from samples import OP_CASES, SAMPLES, op_cases

PLAN = ("row_to_pair", "pair_to_row", "expert_offsets")
# Options that the functions decide themselves, and those for which they call other ops.
OWN = {"keep_pre", "alpha", "limit", "offset", "interleaved"}  # the last four are a Glu's
COMPOSED = {"lora", "lora_up", "lora_down"}
SAMPLE = next(sample for sample in SAMPLES if sample.name == "dropped")
DOCS = Path(__file__).parents[2] / "docs" / "ops.md"


def needed(op):
    """The arguments of a call of ``op`` that have no default, by position and by name."""
    case = op_cases(op, SAMPLE, torch.float32)[0]
    arguments = case.overload._schema.arguments
    given = dict(zip((a.name for a in arguments), case.args, strict=False))
    given = {a.name: given[a.name] for a in arguments if not a.has_default_value()}
    named = {a.name: given.pop(a.name) for a in arguments if a.kwarg_only and a.name in given}
    return tuple(given.values()), named


def leaves(outputs):
    return _pytree.tree_leaves(outputs)


def assert_equal(actual, expected):
    assert len(leaves(actual)) == len(leaves(expected))
    for got, want in zip(leaves(actual), leaves(expected), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("op", OP_CASES)
def test_defaults_only(op):
    """Equal to the call with every default written out, in Python and from a saved exported program."""
    args, named = needed(op)
    call = getattr(torch.ops.moeops, op)
    arguments = call.default._schema.arguments
    defaults = {a.name: a.default_value for a in arguments if a.has_default_value()}
    expected = call(*args, **named, **defaults)
    assert leaves(expected)
    assert_equal(call(*args, **named), expected)

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            values = iter(tensors)
            filled = [next(values) if isinstance(a, torch.Tensor) else a for a in args]
            return call(*filled, **named)

    tensors = tuple(a for a in args if isinstance(a, torch.Tensor))
    program = torch.export.export(Module(), tensors)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    assert_equal(torch.export.load(file).module()(*tensors), expected)


@pytest.mark.parametrize("op", moeops.ops.__all__)
def test_names_order_and_defaults_are_those_of_the_function(op):
    parameters = inspect.signature(getattr(moeops, op)).parameters
    places = [name for name, p in parameters.items() if p.kind is not p.KEYWORD_ONLY]
    if "plan" in places:
        at = places.index("plan")
        places[at : at + 1] = PLAN
    arguments = getattr(torch.ops.moeops, op).default._schema.arguments
    before_star = [a.name for a in arguments if not a.kwarg_only]
    assert before_star[: len(places)] == places
    # What is left before the star are tensors that the function takes by name, in its order.
    by_name = [name for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY]
    tensors = before_star[len(places) :]
    assert tensors == [name for name in by_name if name in tensors]
    options = {a.name for a in arguments} - {*places, *OWN}
    assert options == set(by_name) - COMPOSED
    for argument in arguments:
        if argument.name in options:
            assert argument.has_default_value(), argument.name
        if argument.has_default_value() and argument.name not in OWN:
            assert parameters[argument.name].default == argument.default_value, argument.name


def test_documentation_calls_every_op():
    text = DOCS.read_text()
    for op in OP_CASES:
        assert re.search(rf"\bops\.(moeops\.)?{op}\(", text), op
    for op in moeops.ops.__all__:
        assert f"moeops.{op}(" in text.replace("ops.moeops.", ""), op


def test_documentation_runs():
    names: dict = {}
    compared = 0
    for block in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S):
        exec(compile(block, str(DOCS), "exec"), names)
        if "raw" in names:
            assert_equal(names.pop("raw"), names.pop("own"))
            compared += 1
    assert compared == len(moeops.ops.__all__) + 1  # the block has a second form
