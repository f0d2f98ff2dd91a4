"""What a gate takes and returns. T tokens, K experts per token, E experts, D model width."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moeops.ops import _checks


def _in_backward() -> bool:
    """Autograd is running: this forward is a recomputation made by activation checkpointing."""
    return torch._C._current_graph_task_id() != -1


def exporting() -> bool:
    """torch.export is tracing. Its flag is read directly: torch 2.11's Dynamo takes isexporting() for always true."""
    return torch.compiler._is_exporting_flag


class BaseGate(nn.Module):
    """Base of all gates: subclass it, write ``forward`` in plain PyTorch, and hand the class to a layer.

    ``forward(x [T, D])`` returns ``(topk_ids [T, K], topk_weights [T, K])``: int64 (or int32) expert ids in
    ``[-1, E)``, -1 for a dropped slot, and the float weights of the experts' outputs. Layers call the class as
    ``gate(d_model, num_expert, world_size, top_k)``, with ``gate_bias=`` where the constructor takes it.

    An auxiliary loss goes to ``set_loss`` in ``forward``; the training loop fetches it with ``get_loss``, or those of
    all gates with ``moeops.auxiliary_loss``. Only the newest loss is held. What happens to it elsewhere:

    - ``torch.compile``: the loss is one more output of the graph. ``torch.export``: skipped, an exported program has
      no attributes to write to.
    - Activation checkpointing: the recomputation in the backward does not set the loss a second time. With
      ``use_reentrant=True`` torch runs the forward without gradients, so the loss has a value but no gradient; use
      ``use_reentrant=False``. A checkpoint inside a compiled function needs
      ``torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True``, which says the same to torch.
    - ``nn.DataParallel``: the replicas' losses vanish with the replicas; return the loss from the model's forward.
    - ``copy.deepcopy`` and pickle drop it.

    Args:
        num_expert: experts on this rank.
        world_size: ranks that hold different experts; the gate chooses among ``num_expert * world_size``.

    Raises:
        ValueError: a number is below 1.  TypeError: a number is not an int.

    Example:
        >>> class RandomGate(BaseGate):
        ...     def __init__(self, d_model, num_expert, world_size, top_k=2):
        ...         super().__init__(num_expert, world_size)
        ...         self.top_k = top_k
        ...     def forward(self, x):
        ...         weights, ids = torch.rand(x.shape[0], self.tot_expert).topk(self.top_k)
        ...         return ids, weights / weights.sum(-1, keepdim=True)
        >>> RandomGate(8, 4, 1)(torch.randn(5, 8))[0].shape
        torch.Size([5, 2])
    """

    loss: Tensor | None

    def __init__(self, num_expert: int, world_size: int = 1) -> None:
        super().__init__()
        name = type(self).__name__
        _checks.check_int(name, "num_expert", num_expert, 1, "Pass the experts per rank.")
        _checks.check_int(name, "world_size", world_size, 1, "Use 1 for one rank.")
        self.num_expert = num_expert
        self.world_size = world_size
        self.tot_expert = num_expert * world_size
        self.loss = None

    def forward(self, x: Tensor) -> Any:
        """Choose experts: ``x [T, D]`` to ``(topk_ids [T, K], topk_weights [T, K])``."""
        raise NotImplementedError(
            f"{type(self).__name__}: forward must be written by the subclass, got a call of BaseGate's. "
            "Return (topk_ids [T, K], topk_weights [T, K])."
        )

    def _records(self) -> bool:
        """This forward may leave something behind: it is not exported, nor a recomputation by checkpointing."""
        if exporting():
            return False
        return torch.compiler.is_compiling() or not _in_backward()

    def set_loss(self, loss: Tensor) -> None:
        """Keep the auxiliary loss of this forward; what is left of an earlier one is replaced."""
        if self._records():
            self.loss = loss

    def get_loss(self, clear: bool = True) -> Tensor | None:
        """Hand over the auxiliary loss: a scalar with a gradient to the gate, ``None`` if there is none.

        Args:
            clear: forget it, so that it is counted once and its graph can be freed.
        """
        loss = self.loss
        if clear:
            self.loss = None
        return loss

    @property
    def has_loss(self) -> bool:
        """A forward has set a loss that was not fetched yet."""
        return self.loss is not None

    def __getstate__(self) -> dict[str, Any]:
        # A loss is part of one forward's graph: deepcopy refuses it and pickle has no use for it.
        return {**self.__dict__, "loss": None}


def check_top_k(gate: str, top_k: object, num_experts: int) -> None:
    """``top_k`` is an int from 1 to the number of experts."""
    _checks.check_int(gate, "top_k", top_k, 1, "Choose 1 <= top_k <= num_expert * world_size.")
    if top_k > num_experts:  # type: ignore[operator]
        raise ValueError(
            f"{gate}: top_k must be at most the {num_experts} experts, got {top_k}. Lower top_k."
        )


def auxiliary_loss(model: nn.Module, clear: bool = True) -> Tensor:
    """Sum the losses that the gates of a model have set and that were not fetched yet.

    Call it after each forward, before the backward: with gradient accumulation once per micro-batch, scaled like the
    micro-batch's own loss. Inside a compiled function it is part of the graph. A gate that several layers share is
    counted once, with the loss of its newest forward.

    Args:
        model: any module; every ``BaseGate`` in ``model.modules()`` is asked.
        clear: forget the losses, so that each is counted once and its graph can be freed.

    Returns:
        A scalar with gradients to the gates, at least float32, on the device of the model's first parameter; 0 if no
        gate has a loss.

    Raises:
        TypeError: ``model`` is not a module.
    Host sync: none.

    Example:
        >>> from moeops.gates import SwitchGate
        >>> model = nn.ModuleList(SwitchGate(8, 4) for _ in range(2))
        >>> _ = [gate(torch.randn(5, 8)) for gate in model]
        >>> bool(auxiliary_loss(model) > 0), float(auxiliary_loss(model))
        (True, 0.0)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"auxiliary_loss: model must be a torch.nn.Module, got {_checks.describe(model)}. "
            "Pass the module that holds the gates."
        )
    first = next(model.parameters(), None)
    total = torch.zeros((), device=None if first is None else first.device)
    for module in model.modules():
        if isinstance(module, BaseGate):
            loss = module.get_loss(clear)
            if loss is not None:
                total = total + loss.to(total.device)
    return total
