"""Memory that the C library keeps when it is freed.

XLA asks for its temporary memory anew at every call. Beyond 32 MiB glibc maps it and gives it back, page by
page, which costs a fifth to a quarter of the time of training on a CPU. Worker processes and benchmarks tell
it to keep what it has; a long training run in the foreground can do the same:

    GLIBC_TUNABLES=$(python -m experiments.freed_memory) zoo train text
"""

import os
import platform
import sys

VARIABLE = "GLIBC_TUNABLES"
KEEP = (
    "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=68719476736"
    ":glibc.malloc.top_pad=268435456:glibc.malloc.hugetlb=1"
)


def environment() -> dict[str, str]:
    """For a process to be started; nothing where the C library is another."""
    return {VARIABLE: KEEP} if platform.libc_ver()[0] == "glibc" else {}


def keep() -> None:
    """Start this process again with such an environment, unless it has one or somebody chose otherwise."""
    if VARIABLE not in os.environ and environment():
        os.execve(sys.executable, sys.orig_argv, environment() | os.environ)


if __name__ == "__main__":
    print(KEEP)
