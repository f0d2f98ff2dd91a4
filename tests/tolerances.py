"""How far a result may lie from the reference computed in float64 from the same rounded inputs."""

from __future__ import annotations

import torch
from torch import Tensor

# Relative to the largest magnitude of the expected tensor: room for a rounded intermediate or two and for
# sums of some hundred terms in the accumulate type.
TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}
# Every type, and one more run in which torch fills empty tensors with NaN, so that an unwritten element is seen.
VALUES_DTYPES = [*((dtype, False) for dtype in TOLERANCES), (torch.float32, True)]
# Inputs are near one, so that an expected zero may come out as their rounding error.
SMALLEST_SCALE = 0.01


def assert_close(
    actual: Tensor, expected: Tensor, dtype: torch.dtype, what: str = "result"
) -> None:
    """``actual``, computed in ``dtype``, has the shape of ``expected`` and lies within the table's tolerance."""
    expected = expected.detach().to("cpu", torch.float64)
    actual = actual.detach().to("cpu", torch.float64)
    scale = max(SMALLEST_SCALE, float(expected.abs().max())) if expected.numel() else 1.0
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(
        actual,
        expected,
        rtol=tolerance,
        atol=tolerance * scale,
        msg=lambda text: f"{what} in {dtype}: {text}",
    )
