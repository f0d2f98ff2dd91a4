"""The CPU kernels give the same bits with any number of threads."""

from __future__ import annotations

import pytest
import torch

from samples import OP_CASES, SAMPLES, op_cases

# mm may split its sums by thread.
WITH_MM = {
    "grouped_linear",
    "grouped_linear_weight_grad",
    "moe_mlp",
    "moe_mlp_backward_data",
    "moe_mlp_backward_weights",
}


@pytest.fixture
def restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("op", OP_CASES)
@pytest.mark.parametrize("name", ["wide", "long"])
def test_thread_count_changes_nothing(op, name, restore_threads):
    sample = next(s for s in SAMPLES if s.name == name)
    for case in op_cases(op, sample, torch.float32):
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            outputs = case.run()
            results.append(outputs if isinstance(outputs, tuple) else (outputs,))
        for other in results[1:]:
            for got, want in zip(other, results[0], strict=True):
                if op in WITH_MM:
                    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
                else:
                    assert torch.equal(got, want)
