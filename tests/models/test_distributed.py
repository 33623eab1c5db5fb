"""Several processes compute the gradients of one: DistributedDataParallel and FSDP2, over gloo."""

import os
import socket
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from tests.models.families import FAMILIES, in_training, loss_of
from tests.support import random_tensor

BLOCKS = ("RepConvBlock", "DynamicConvBlock", "Bottleneck", "Block", "ClassBlock")
LEAVES = ("Conv2d", "DepthwiseConv2d", "BatchNorm2d", "LayerNorm2d", "LayerNorm", "Linear")


def two_processes(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for family in FAMILIES:
        x = random_tensor(4, 3, 64, 64, seed=1, device="cpu").chunk(2)[rank]
        replicated = DistributedDataParallel(in_training(family))
        for _ in range(2):  # a parameter without a gradient is an error in the second step
            replicated.zero_grad()
            loss_of(replicated, x).backward()
        gradients = {name: p.grad for name, p in replicated.module.named_parameters()}

        found = [gradients]
        mesh = init_device_mesh("cpu", (2,))
        for parts in (BLOCKS, LEAVES):
            sharded = in_training(family)
            for module in list(sharded.modules()):
                if type(module).__name__ in parts:
                    fully_shard(module, mesh=mesh)
            fully_shard(sharded, mesh=mesh)
            loss_of(sharded, x).backward()
            full: Any = {name: p.grad for name, p in sharded.named_parameters()}
            clip_grad_norm_(sharded.parameters(), 1e9)  # as training loops do
            found.append({name: grad.full_tensor() for name, grad in full.items()})
        if rank == 0:
            torch.save(found, f"{folder}/{family}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_compute_the_gradients_of_one(tmp_path):
    """DistributedDataParallel and FSDP2 (``fully_shard``, block by block and layer by layer), over gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(two_processes, (port, str(tmp_path)), nprocs=2)
    for family in FAMILIES:
        model = in_training(family)
        loss_of(model, random_tensor(4, 3, 64, 64, seed=1, device="cpu")).backward()
        expected = {name: p.grad for name, p in model.named_parameters()}
        scale = max(float(grad.norm()) for grad in expected.values())
        found = torch.load(tmp_path / f"{family}.pt", weights_only=True)
        for what, ours in zip(("DDP", "FSDP2 of blocks", "FSDP2 of layers"), found, strict=True):
            assert ours.keys() == expected.keys()
            for name, grad in expected.items():
                error = float((ours[name] - grad).norm())
                assert error <= 1e-4 * float(grad.norm()) + 1e-6 * scale, f"{family} {what} {name}"
