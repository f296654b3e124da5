"""What trainings need at least, from the shapes of their models: memory and disk, against what this machine has."""

import shutil
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cpo_pipe.data.config import Section
from cpo_pipe.data.errors import InputError
from cpo_pipe.data.execution import processes
from cpo_pipe.data.models.fetch import check_exists
from cpo_pipe.data.models.model import Model, ScratchModel, made_from, new_network
from cpo_pipe.data.models.tokenizer import locate_tokenizer
from cpo_pipe.resolve import Resolver

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GIB = 1 << 30
TRAINED_BYTES = 16
"""Per parameter: weights, gradients and AdamW's two moments, in float32."""
FROZEN_BYTES = 4
"""Per parameter of a model that only adapters change."""
STATE_BYTES = 12
"""Per parameter on disk while a training is in progress: weights and moments, for resuming."""
CHECKPOINT_BYTES = 4
_CGROUP = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Need:
    """What a training needs at least; activations come on top."""

    parameters: int
    memory: int
    """Bytes of weights, gradients and optimizer."""
    disk: int
    """Bytes of its checkpoint."""
    state: int
    """Bytes of its resume checkpoint, until it ends."""


def training_needs(resolver: Resolver) -> dict[str, Need]:
    """Return what each training needs whose model's shapes are known: a hub model's are after its download."""
    found: dict[str, Need] = {}
    sizes: dict[str, int | None] = {}

    def size(init: str | Section) -> int | None:
        key = init if isinstance(init, str) else init.model_dump_json()
        if key not in sizes:
            sizes[key] = None
            with suppress(InputError) if isinstance(init, str) else nullcontext():  # reported by other checks
                trained = isinstance(init, str) and init in trainings
                sizes[key] = size(trainings[str(init)].init) if trained else _parameters(resolver, init)
        return sizes[key]

    trainings = resolver.trainings
    for name, training in trainings.items():
        try:
            count = size(training.init)
        except InputError as error:  # of a scratch model
            raise InputError(f"train.{name}.{error}") from error
        if count:
            lora = training.lora is not None
            memory = count * (FROZEN_BYTES if lora else TRAINED_BYTES)
            state = 0 if lora else count * STATE_BYTES
            found[name] = Need(count, memory, count * CHECKPOINT_BYTES, state)
    return found


def _parameters(resolver: Resolver, init: str | Section) -> int | None:
    if isinstance(init, str):
        folder = check_exists(init, "model")
        return _count(Model(init, folder, "").skeleton()) if folder is not None else None
    import torch
    from transformers import AutoConfig

    assert isinstance(init, ScratchModel)
    try:
        init.check_keys()
    except InputError:  # reported by the check of the keys
        return None
    tokenizer = resolver.recipe.data.tokenizer
    if isinstance(tokenizer, str):
        vocabulary = len(locate_tokenizer(tokenizer, resolver.store).load())
    else:
        vocabulary = tokenizer.vocab_size
    try:
        config = AutoConfig.for_model(init.architecture, vocab_size=vocabulary, **init.config)
        with torch.device("meta"):
            return _count(new_network(config))
    except Exception as error:  # a config's faults show in any of an architecture's ways
        raise made_from(init, error) from error


def _count(network: "PreTrainedModel") -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def memory_of_device() -> tuple[int, str]:
    """Return the bytes that a training can use, and of what: a GPU, or this machine (its container's limit)."""
    import psutil
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[1]), f"a {torch.cuda.get_device_name()}"
    limit = psutil.virtual_memory().total
    with suppress(OSError, ValueError):
        limit = min(limit, int(_CGROUP.read_text()))
    return limit, "this machine"


def check_fits(resolver: Resolver, needs: dict[str, Need]) -> None:
    """Refuse a training that cannot fit into memory, or whose checkpoints cannot fit on the disk.

    Trainings in several processes are not checked: they share out what they need.

    Raises:
        InputError: one does not fit.
    """
    if processes.count() > 1:
        return
    total, where = memory_of_device()
    missing = [name for name in needs if not _trained(resolver, name)]
    for name in missing:
        need = needs[name]
        if need.memory > total:
            raise InputError(
                f"train.{name}: {need.parameters:,} parameters need at least {need.memory / GIB:.1f} GiB for weights, "
                f"gradients and optimizer, but {where} has {total / GIB:.1f} GiB; set lora, start from a smaller "
                "model, or train in several processes with FSDP (--force runs it anyway)"
            )
    disk = sum(needs[name].disk for name in missing) + max((needs[name].state for name in missing), default=0)
    folder = resolver.store.local
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if disk > free:
        raise InputError(
            f"--store {resolver.store.name}: the checkpoints of {', '.join(missing)} need {disk / GIB:.3g} GiB, but "
            f"{free / GIB:.3g} GiB are free; free some space, or name another store (--force runs it anyway)"
        )


def _trained(resolver: Resolver, name: str) -> bool:
    with suppress(InputError):
        resolver.model(name)
        return True
    return False
