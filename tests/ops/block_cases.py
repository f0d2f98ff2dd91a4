"""Calls and plans that the tests of the expert block share."""

from __future__ import annotations

import torch

from moeops import reference


def call(function, plan, activation):
    """The op or its reference as a function of named tensors."""
    return lambda x, topk_weights, **weights: function(
        x, plan, topk_weights, activation=activation, **weights
    )


def uneven_plan(rows_per_expert, top_k):
    """A plan whose experts have these many rows, tokens in random order."""
    ids = torch.repeat_interleave(torch.arange(len(rows_per_expert)), torch.tensor(rows_per_expert))
    ids = ids[torch.randperm(len(ids))].reshape(-1, top_k)
    return reference.sort_tokens(ids, len(rows_per_expert)), ids.shape[0]
