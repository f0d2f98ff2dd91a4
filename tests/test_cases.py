"""``each`` runs all cases and says which failed; ``every_pair`` leaves no pair out."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch

from cases import each, every_pair


def test_every_case_runs_from_the_same_random_numbers_and_failures_are_named():
    seen = []

    @each("number", [1, 2, 3])
    @each(("letter", "size"), [("a", 4), pytest.param("b", 5, id="second")])
    def item(number, letter, size, device):
        seen.append((number, letter, size, device, float(torch.rand(()))))
        assert number != 2 or letter == "a", f"got {size}"

    assert list(inspect.signature(item).parameters) == ["device"]
    with pytest.raises(AssertionError) as caught:
        item(device="cpu")
    numbers = [case[:4] for case in seen]
    assert numbers == [
        (n, *rest, "cpu") for n, rest in itertools.product([1, 2, 3], [("a", 4), ("b", 5)])
    ]
    assert len({case[4] for case in seen}) == 1
    first, second, third, *_ = str(caught.value).splitlines()
    assert first == "1 of 3 cases of item failed"
    assert second == "2: AssertionError: 1 of 2 cases of item failed"
    assert third.startswith("second: AssertionError: got 5")


def test_an_item_is_skipped_only_if_all_its_cases_are():
    @each("number", [1, 2])
    def item(number, least):
        if number < least:
            pytest.skip(f"{number} is too small")

    item(least=2)
    with pytest.raises(pytest.skip.Exception, match="1 is too small"):
        item(least=3)


def test_no_cases_and_unknown_names_are_errors():
    with pytest.raises(AssertionError, match="no cases"):
        each("number", [])
    with pytest.raises(AssertionError, match="letter"):
        each("letter", ["a"])(lambda number: None)


def test_every_pair_meets_every_pair_by_fewer_cases():
    axes = [list("abcd"), [1, 2, 3], [True, False]]
    cases = [case.values for case in every_pair(*axes)]
    for (i, left), (j, right) in itertools.combinations(enumerate(axes), 2):
        met = {(case[i], case[j]) for case in cases}
        assert met == set(itertools.product(left, right))
    assert len(cases) == 12
