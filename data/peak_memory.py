"""The peak of this process's memory, from one moment to another."""

import re
import sys
from contextlib import suppress
from pathlib import Path

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def reset() -> None:
    """Let the peak begin here. Where the kernel does not allow it, the peak is that since the process began."""
    with suppress(OSError):
        _CLEAR.write_text("5")
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak() -> dict[str, int]:
    """Return the peak in bytes: `memory` of the machine, and `gpu_memory` where there is a GPU."""
    found: dict[str, int] = {}
    with suppress(OSError):
        if (line := re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())) is not None:
            found["memory"] = int(line[1]) * 1024
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_available():
        found["gpu_memory"] = int(torch.cuda.max_memory_reserved())
    return found
