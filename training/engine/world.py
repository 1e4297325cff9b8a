"""The processes of a run: one alone, or as many as torchrun started, on one machine or on many.

The trainables are replicated and their gradients averaged (DistributedDataParallel). A frozen base needs no averaging.
It is replicated too or, where it does not fit, sharded over the processes of one machine (FSDP2).
"""
from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

TIMEOUT = timedelta(minutes=30)  # a process may wait this long for the others: one of them may be saving or exporting


# The group lives as long as the process. A DDP module that holds its last reference frees it without releasing Python's
# lock. A thread of gloo may wait for that lock: a rare hang at the very end.
_joined: list = []


def pick_device(name: str) -> torch.device:
    """auto: a GPU where there is one. cuDNN's attention is then left out: its backward failed at short sequences in bf16
    (CUBLAS_STATUS_EXECUTION_FAILED, or losses that are not finite; PyTorch 2.11 on an H100), where flash does not."""
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def unsure_restarts() -> bool:
    """Whether torchrun started this process, may restart it, and shares its own store with all of its restarts.

    The store's keys, among them the address of every process, then outlive the processes (pytorch pull request 128096).
    """
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"


@dataclass(frozen=True)
class World:
    """Who this process is among the processes of a run."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    """Processes on this machine."""
    device: torch.device

    @classmethod
    def start(cls, device: str = "auto") -> World:
        """Join the world that torchrun describes in the environment, at the first call. Without torchrun, a process
        alone.

        device: auto, cpu or cuda (the GPU with this process's local rank).
        """
        place = {k: int(os.environ.get(k, d)) for k, d in
                 (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))}
        picked = pick_device(device)
        if picked.type == "cuda" and picked.index is None:
            if place["LOCAL_WORLD_SIZE"] > torch.cuda.device_count():
                raise ValueError(f"{place['LOCAL_WORLD_SIZE']} processes were started on a machine with "
                                 f"{torch.cuda.device_count()} GPUs; give torchrun --nproc-per-node "
                                 f"{torch.cuda.device_count()}.")
            picked = torch.device("cuda", place["LOCAL_RANK"])
        if picked.type == "cuda":
            torch.cuda.set_device(picked)
        if place["WORLD_SIZE"] > 1 and not dist.is_initialized():
            if place["RANK"] == 0 and unsure_restarts():
                print("torchrun lets restarted processes find the addresses of dead ones (pytorch issue 135712), and "
                      "a restart may fail or hang: start it with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the "
                      "environment, and with --standalone or --rdzv-backend c10d.", flush=True)
            # Messages among the processes (a signal, a checkpoint's name) go over gloo beside NCCL's stream.
            dist.init_process_group("cpu:gloo,cuda:nccl" if picked.type == "cuda" else "gloo", timeout=TIMEOUT)
            _joined.append(dist.group.WORLD)
        return cls(place["RANK"], place["WORLD_SIZE"], place["LOCAL_RANK"], place["LOCAL_WORLD_SIZE"], picked)

    @property
    def main(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    def share(self, batch: int, micro: int = 0) -> list[range]:
        """This process's micro-batches of the global batch: `micro` samples each, 0 for all of its share at once.

        Raises ValueError where the batch cannot be divided like that.
        """
        step = micro or max(1, batch // self.size)
        if step < 1 or batch % (self.size * step):
            sizes = [n for n in range(1, batch // max(1, micro) + 1) if batch % (n * max(1, micro)) == 0]
            if not sizes:
                raise ValueError(f"run.batch {batch} is not a multiple of run.micro {micro}; make it one.")
            raise ValueError(f"run.batch {batch} cannot be shared by {self.size} processes{f' with run.micro {micro}' if micro else ''}; "
                             f"{', '.join(map(str, sizes))} would work.")
        own = batch // self.size
        return [range(i, i + step) for i in range(self.rank * own, (self.rank + 1) * own, step)]

    def data_parallel(self, module: nn.Module) -> nn.Module:
        """The module with gradients averaged over all processes. Its weights are those of the first process."""
        if self.size == 1:
            return module
        # The parameters that a step uses change with growth. DDP must not wait for one that no process used.
        return nn.parallel.DistributedDataParallel(module, broadcast_buffers=False, find_unused_parameters=True)

    def mean(self, values: list[float]) -> list[float]:
        """The mean of each number over all processes, in float64."""
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return (total / self.size).tolist()

    def any(self, word: bool) -> bool:
        """Whether the value is true in any process."""
        return self.mean([float(word)])[0] > 0

    def broadcast(self, word):
        """The first process's argument, in every process. The arguments of the others are ignored."""
        if self.size == 1:
            return word
        box = [word]
        dist.broadcast_object_list(box, device=torch.device("cpu"))
        return box[0]

    def gathered(self, word) -> list:
        """The arguments of all processes, in their order."""
        if self.size == 1:
            return [word]
        box = [None] * self.size
        dist.all_gather_object(box, word)
        return box

    def leave(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()


def check_shardable(precision: str) -> None:
    """Refuse to shard a quantised base. FSDP2 splits plain tensors only: torchao's int8 raises on the split, and
    bitsandbytes' NF4 loses its state (pytorch/ao issues 1929 and 4837)."""
    if precision in ("int8", "nf4"):
        raise ValueError(f"A base in {precision} cannot be sharded; take precision bf16, or replicate the "
                         "quantised base.")


def check_sharding(precision: str, world: World) -> None:
    """Refuse to shard what cannot be sharded: a quantised base, a base on one process, or one on machines of unequal
    size.

    precision: bf16, fp32, int8 or nf4.
    """
    check_shardable(precision)
    if world.local_size < 2:
        raise ValueError("There is one process on this machine, so there is nothing to shard over; start more with "
                         "torchrun, or do not shard the base.")
    if world.size % world.local_size:
        raise ValueError(f"{world.size} processes with {world.local_size} on this machine: sharding needs as "
                         "many on each.")


def shard_base(flux: nn.Module, world: World) -> nn.Module:
    """Shard a frozen Flux over the processes of each machine, block by block (FSDP2). It is replicated between
    machines.

    Its weights are gathered block by block in the forward and again in the backward. Its gradients are never reduced.
    """
    quantised = any(not p.dtype.is_floating_point or type(p.data) is not torch.Tensor for p in flux.parameters())
    check_sharding("int8" if quantised else "bf16", world)
    if any(p.requires_grad for p in flux.parameters()):
        raise ValueError("Only a frozen base can be sharded here; set requires_grad_(False) on it first.")
    mesh = init_device_mesh(world.device.type, (world.size // world.local_size, world.local_size),
                            mesh_dim_names=("machines", "inside"))["inside"]
    for block in (*flux.transformer_blocks, *flux.single_transformer_blocks):
        fully_shard(block, mesh=mesh)
    return fully_shard(flux, mesh=mesh)
