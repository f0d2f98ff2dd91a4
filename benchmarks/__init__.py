"""Speed and memory of moeops beside its peers, checked before it is timed: ``python -m benchmarks.run``."""
