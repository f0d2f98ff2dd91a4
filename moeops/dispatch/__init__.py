"""From tokens to the experts that a gate chose, on whatever rank they are, and back: one dispatcher per file."""

from moeops.dispatch.base import Dispatcher, DispatchOptions, ExpertRanks
from moeops.dispatch.local import LocalDispatcher
from moeops.dispatch.options import Exact, Static
from moeops.dispatch.replicas import Placement
from moeops.dispatch.shadowing import ShadowPolicy

__all__ = [
    "DispatchOptions",
    "Dispatcher",
    "Exact",
    "ExpertRanks",
    "LocalDispatcher",
    "Placement",
    "ShadowPolicy",
    "Static",
]
