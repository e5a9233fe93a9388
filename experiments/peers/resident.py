"""Memory of this process on Linux: what it has, and the most it had since it was asked to forget."""

import re
import resource
from pathlib import Path

PROCESS = Path("/proc/self")
MOST = 8 * 10**9  # bytes of data that a benchmark may have


def _field(name):
    found = re.search(rf"^{name}:\s+(\d+) kB", (PROCESS / "status").read_text(), re.MULTILINE)
    return 1024 * int(found[1])


def present():
    """Bytes in memory now."""
    return _field("VmRSS")


def peak():
    """The most bytes in memory since `forget`, or since the process began."""
    return _field("VmHWM")


def forget():
    """Count the peak from here on."""
    (PROCESS / "clear_refs").write_text("5")


def limit():
    """Rather an error here than a machine without memory."""
    resource.setrlimit(resource.RLIMIT_DATA, (MOST, MOST))
