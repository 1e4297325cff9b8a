"""torch.compile in training: block by block, and refused in one sentence where it cannot work."""
from __future__ import annotations

import os
import shutil

import torch
from torch import nn


def check_compiler() -> None:
    """Raise ValueError where torch.compile would fail for want of a C++ compiler."""
    names = [n for n in (os.environ.get("CXX"), "c++", "g++", "clang++", "cl") if n]
    if not any(map(shutil.which, names)):
        raise ValueError("torch.compile needs a C++ compiler and none is on the PATH; install one (g++), or give "
                         "--run.no-compile.")


GRAPHS = 512  # most graphs for a class of blocks; beyond it PyTorch goes on without compiling


def compile_blocks(*stacks: nn.ModuleList) -> None:
    """Compile networks block by block: one small graph for each sequence length."""
    # All blocks of a class share their code. A run has a graph for each bucket with each number of tokens. These names
    # exist in every release.
    torch._dynamo.config.cache_size_limit, torch._dynamo.config.accumulated_cache_size_limit = GRAPHS, 8 * GRAPHS
    for stack in stacks:
        for block in stack:
            block.compile(dynamic=False)
