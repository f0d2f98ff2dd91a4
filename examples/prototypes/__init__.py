"""Block kernels with shared memory, written with ``moeops.numba``: what the native ops of the same names do."""
