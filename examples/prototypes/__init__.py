"""Prototypes written with ``moeops.numba`` that do what native ops do: routing rules, kernels with shared memory."""
