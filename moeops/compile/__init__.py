"""The schedule of expert-parallel layers in compiled code: passes over Inductor's graphs, and the options for them."""

from moeops.compile.degrees import SetDegrees
from moeops.compile.explain import explain
from moeops.compile.gradient_slices import GradientSlices
from moeops.compile.options import PASSES, options
from moeops.compile.order import Order
from moeops.compile.passes import Pass
from moeops.compile.timeline import measured_tasks, predicted_tasks, tasks_of_trace, timeline

__all__ = [
    "PASSES",
    "GradientSlices",
    "Order",
    "Pass",
    "SetDegrees",
    "explain",
    "measured_tasks",
    "options",
    "predicted_tasks",
    "tasks_of_trace",
    "timeline",
]
