"""Checkpoints of models with experts on many ranks, for any number of ranks."""

from moeops.distributed.checkpoint.api import (
    load_checkpoint,
    merge_checkpoint,
    read_extra,
    save_checkpoint,
)

__all__ = ["load_checkpoint", "merge_checkpoint", "read_extra", "save_checkpoint"]
