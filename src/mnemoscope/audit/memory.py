"""How much memory a block of work took at most."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass
class Peak:
    """Largest memory in use while the block ran; None where the system does not tell."""

    megabytes: float | None = None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Watch the device's memory, or on Linux the process's own: the largest since the block began, weights included."""
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.megabytes = round(torch.cuda.max_memory_allocated(device) / 1e6, 1)
        return
    # Writing 5 there makes Linux forget the largest resident size so far.
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    yield peak
    with suppress(OSError, StopIteration, ValueError):
        status = Path("/proc/self/status").read_text().splitlines()
        peak.megabytes = round(int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1.024e-3, 1)
