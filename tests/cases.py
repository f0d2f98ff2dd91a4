"""How the cases of a test become items: combinations by pairs, and many quick cases in one item."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Sequence

import pytest
import torch

ParameterSet = type(pytest.param())


def each(names: str | tuple[str, ...], cases: Sequence, ids: Sequence | Callable | None = None):
    """``pytest.mark.parametrize`` in one item: for cases of a few milliseconds, less than an item of their own costs.

    Every case starts from the same random numbers, runs whatever the others do, and is named if it fails. A case that
    skips itself skips the item only if all do.
    """
    names = tuple(n.strip() for n in names.split(",")) if isinstance(names, str) else tuple(names)
    listed = []
    for place, case in enumerate(cases):
        if isinstance(case, ParameterSet):
            assert not case.marks, f"{case} needs an item of its own"
            values, label = case.values, case.id
        else:
            values, label = ((case,) if len(names) == 1 else tuple(case)), None
        if label is None:
            name = ids if callable(ids) else _name
            label = ids[place] if isinstance(ids, Sequence) else "-".join(map(name, values))
        assert len(values) == len(names), f"{names} get {values}"
        listed.append((label, dict(zip(names, values, strict=True))))
    assert listed, f"no cases of {names}"

    def decorate(test):
        signature = inspect.signature(test)

        @functools.wraps(test)
        def item(**fixtures):
            failed, skipped = [], []
            for label, values in listed:
                torch.manual_seed(0)
                try:
                    test(**fixtures, **values)
                except pytest.skip.Exception as skip:
                    skipped.append(str(skip))
                except Exception as err:
                    failed.append((label, err))
            if failed:
                lines = [f"{label}: {type(err).__name__}: {err}" for label, err in failed]
                count = f"{len(failed)} of {len(listed)} cases of {test.__name__} failed"
                raise AssertionError("\n".join([count, *lines])) from failed[0][1]
            if len(skipped) == len(listed):
                pytest.skip(skipped[0])

        others = [p for name, p in signature.parameters.items() if name not in names]
        assert len(others) + len(names) == len(signature.parameters), f"{test.__name__}: {names}"
        item.__signature__ = signature.replace(parameters=others)
        return item

    return decorate


def every_pair(*axes: Sequence) -> list:
    """Cases for ``parametrize`` in which any two values of different axes meet, by far fewer than the full product.

    For options that do not interact in threes. The two longest axes come first.
    """
    places = [range(len(axis)) for axis in axes]

    def pairs(case: tuple[int, ...]) -> set:
        return set(itertools.combinations(enumerate(case), 2))

    product = list(itertools.product(*places))
    missing = set().union(*map(pairs, product))
    cases = []
    # First a case for every pair of the two longest axes, then what is still missing.
    starts = [
        [case for case in product if case[:2] == pair] for pair in itertools.product(*places[:2])
    ]
    while missing:
        best = max(
            starts.pop(0) if starts else product, key=lambda case: len(pairs(case) & missing)
        )
        missing -= pairs(best)
        cases.append([axis[place] for axis, place in zip(axes, best, strict=True)])
    return [pytest.param(*case, id="-".join(map(_name, case))) for case in cases]


def _name(value: object) -> str:
    return str(value).removeprefix("torch.")
