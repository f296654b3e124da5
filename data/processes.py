"""Which of several processes this is, where `accelerate launch` (or torchrun) started more than one."""

import os


def count() -> int:
    """How many processes take part."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is the one that speaks and writes for all."""
    return int(os.environ.get("RANK", "0")) == 0
