"""Which of several processes this is, where `accelerate launch` (or torchrun) started more than one."""

import os


def count() -> int:
    """Return how many processes take part."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Return whether this is the process that prints and writes for all."""
    return int(os.environ.get("RANK", "0")) == 0
