"""The engine: what every stage's training shares, from one process to many machines."""
from .ahead import Ahead
from .compiling import compile_blocks
from .learner import learning_rate
from .loop import launch, train
from .stage import Stage, Step, seeded
from .world import World, check_shardable, check_sharding, pick_device, shard_base

__all__ = ["Ahead", "Stage", "Step", "World", "check_shardable", "check_sharding", "compile_blocks", "launch", "learning_rate",
           "pick_device", "seeded",
           "shard_base", "train"]
