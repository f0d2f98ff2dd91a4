"""DistributedDataParallel with local experts: several processes train what one process trains."""

from __future__ import annotations

import os
import time
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from layer_cases import D, make_layer
from torch.nn.parallel import DistributedDataParallel

pytestmark = pytest.mark.distributed

STEPS = 3
TOKENS = 12  # over all ranks


def build(kind: str, device: str):
    torch.manual_seed(11)
    layer = make_layer(kind, "naive", device)
    with torch.no_grad():
        # Expert 3 gets no token anywhere, and expert 0 none on the last rank.
        layer.gate.gate.bias.copy_(torch.tensor([0.0, 0.0, 0.0, -1e4]))
    return layer


def batches(device: str):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(TOKENS, D, generator=generator).to(device) for _ in range(STEPS)]


def train(model, steps):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x in steps:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def worker(
    rank: int, world_size: int, backend: str, kind: str, compiled: bool, folder: str
) -> None:
    # A failing rank must end, not wait for its peers in the destructor of the group.
    try:
        device = "cpu" if backend == "gloo" else f"cuda:{rank}"
        torch.set_num_threads(1)
        dist.init_process_group(
            backend,
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=60),
        )
        layer = build(kind, device)
        model = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
        model = DistributedDataParallel(model)
        train(model, [x.chunk(world_size)[rank] for x in batches(device)])
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None, f"{name} has no gradient on rank {rank}"
        torch.save(layer.state_dict(), f"{folder}/rank{rank}.pt")
        dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def launch(world_size: int, backend: str, kind: str, compiled: bool, folder, seconds: float = 150):
    context = mp.spawn(
        worker, (world_size, backend, kind, compiled, str(folder)), nprocs=world_size, join=False
    )
    deadline = time.monotonic() + seconds
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, f"{world_size} ranks did not end in {seconds} s"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()


def check(world_size: int, backend: str, kind: str, compiled: bool, folder) -> None:
    device = "cpu" if backend == "gloo" else "cuda"
    launch(world_size, backend, kind, compiled, folder)
    reference = build(kind, device)
    train(reference, batches(device))
    for rank in range(world_size):
        state = torch.load(folder / f"rank{rank}.pt", weights_only=True, map_location=device)
        for name, value in reference.state_dict().items():
            torch.testing.assert_close(
                state[name], value, rtol=1e-4, atol=1e-6, msg=lambda t, n=name: f"{n}: {t}"
            )


@pytest.mark.parametrize(
    ("world_size", "kind", "compiled"),
    [(1, "mlp", False), (2, "mlp", False), (2, "mlp", True), (2, "modules", False)],
)
def test_gloo(world_size, kind, compiled, tmp_path):
    check(world_size, "gloo", kind, compiled, tmp_path)


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["mlp", "modules"])
def test_nccl(kind, tmp_path, cuda_device):
    check(min(2, torch.cuda.device_count()), "nccl", kind, False, tmp_path)
