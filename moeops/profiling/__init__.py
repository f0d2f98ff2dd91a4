"""Measures a machine and fits the laws of a cost model: clocks, work of one rank, links, and what a job has of its own.

It is below the dispatchers, so that a layer can measure what it needs when it is built. ``moeops.planner`` measures
more.
"""
