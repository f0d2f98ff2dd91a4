"""What steps of a layer cost on a measured machine: laws of single steps, and the model that holds them."""

from moeops.cost.model import CostModel

__all__ = ["CostModel"]
