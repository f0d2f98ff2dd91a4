"""The planner on paper: ``python -m moeops profile`` measures a machine, ``python -m moeops plan`` predicts more of it.

``shapes`` names models, ``clock`` and ``measure*`` take times, ``fit`` turns them into a cost model
(``moeops.cost.model``), ``predict`` and ``memory`` compute, ``report`` writes tables. Nothing here is imported by
``import moeops``.
"""
