"""Bytes of a layer on one rank."""

from __future__ import annotations

from typing import NamedTuple

from moeops.cost.laws import ITEM_BYTES
from moeops.planner.configuration import OPTIMIZER_BYTES, Choice, Configuration


class Memory(NamedTuple):
    """Bytes per rank of one layer.

    Attributes:
        weights: of experts and gate, without biases of the experts.
        gradients: of these.
        optimizer: its state.
        activations: held from the forward to the backward, the layer's input included.
        exchange: buffers to send and to receive, of the forward.
        workspace: more that the backward needs while it runs.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    exchange: int
    workspace: int

    @property
    def step_peak(self) -> int:
        """Above weights, optimizer and input: what a forward and a backward of this layer alone reach."""
        return self.gradients + self.activations + self.workspace


def layer_memory(config: Configuration, choice: Choice) -> Memory:
    """Count what a layer keeps; chunks change what is in flight, not what is kept."""
    item = ITEM_BYTES[config.dtype]
    parameters = config.expert_parameters + gate_parameters(config)
    tokens, pairs = config.num_tokens, config.num_pairs
    dispatcher = choice.dispatcher
    rows, sent = int(config.kept_rows(dispatcher)), int(config.sent_rows(dispatcher))
    up = (config.num_projections - 1) * config.hidden
    # Logits; weights and ids of the chosen; three maps.
    routing = 4 * tokens * config.num_experts + 12 * tokens * config.top_k + 12 * pairs
    activations = routing + item * (tokens * config.d_model + rows * up)
    exchange = 0
    # Gathered gradients, those of the hidden rows before and after the activation.
    workspace = item * rows * (config.d_model + up + config.hidden)
    if dispatcher == "static":
        # The rows at the experts and their map, and what came back, which the weights' gradient reads.
        activations += item * config.d_model * (rows + pairs) + 12 * rows
        exchange = item * config.d_model * (pairs + rows)
        workspace += item * config.d_model * pairs
    elif config.ranks > 1:
        # Tokens that arrived, their choices and the maps of all their pairs.
        slots = config.top_k * config.tensor_parallel
        activations += sent * (item * config.d_model + 12 * slots) + 4 * rows
        exchange = item * config.d_model * sent * (1 if dispatcher == "gather" else 2)
        workspace += item * config.d_model * sent
    return Memory(
        weights=item * parameters,
        gradients=item * parameters,
        optimizer=OPTIMIZER_BYTES[config.optimizer](item) * parameters,
        activations=activations,
        exchange=exchange,
        workspace=workspace,
    )


def gate_parameters(config: Configuration) -> int:
    """Of ``NaiveGate``: a matrix and a bias."""
    return config.num_experts * (config.d_model + 1)
