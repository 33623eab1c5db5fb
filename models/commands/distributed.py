"""The processes of a run: one, or those that torchrun started."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a group, see process_group
from torch import Tensor, nn


@contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """Joins torchrun's processes, if it started this one (NCCL between GPUs, gloo between CPUs); gives the device.

    With ``device`` "cuda" each process takes the GPU of its local rank.

    The group must end here: gloo's threads abort a process whose interpreter ends before them. Functions of
    ``torch.distributed.nn`` keep the group that exists when they are imported, as their default, and
    DistributedDataParallel imports them; this file does so before there is a group.
    """
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not launched:
        yield device
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    # RedNet computes in channels last, and so come its gradients; copying them into buckets costs little.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    yield device
    dist.destroy_process_group()  # not after an error, when it would wait for the others


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if _joined() else 0


def world_size() -> int:
    return dist.get_world_size() if _joined() else 1


def sum_over_processes(tensor: Tensor) -> Tensor:
    """Replaces ``tensor`` by its sum over all processes and returns it."""
    if _joined():
        dist.all_reduce(tensor)
    return tensor


def broadcast_buffers(module: nn.Module) -> None:
    """Copies the first process's buffers to all others: each has its own running statistics."""
    if _joined():
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)
