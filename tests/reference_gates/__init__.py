"""Gates in plain PyTorch, right in float64: what the tests compare moeops' gates with."""
