"""Numbers with their units, as plans and profiles print them."""

from __future__ import annotations


def gbps(seconds_per_byte: float) -> str:
    """A bandwidth."""
    if not seconds_per_byte:
        return "any number of bytes at once"
    return f"{1e-9 / seconds_per_byte:.4g} GB/s"


def us(seconds: float) -> str:
    """A time."""
    return f"{1e6 * seconds:.3g} us"
