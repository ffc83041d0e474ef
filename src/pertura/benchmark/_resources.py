"""Time and memory of a stretch of work in this process."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from pathlib import Path

_MIB = 2**20


class Resources:
    """Context manager: ``seconds`` of wall-clock time and ``peak_mb``, the largest resident memory in MiB.

    Where the system cannot forget the peak of earlier work (it can on Linux), `peak_mb` is the largest of the
    whole process; NaN where the system does not say.
    """

    seconds: float = float("nan")
    peak_mb: float = float("nan")

    def __enter__(self) -> Resources:
        with suppress(OSError):  # not Linux, or not allowed
            Path("/proc/self/clear_refs").write_text("5")
        self._start = time.perf_counter()
        return self

    def __exit__(self, *exception: object) -> None:
        self.seconds = time.perf_counter() - self._start
        self.peak_mb = _peak() / _MIB


def _peak() -> float:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return float(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak) * (1 if sys.platform == "darwin" else 1024)
