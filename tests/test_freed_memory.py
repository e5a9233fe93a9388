"""A process that keeps freed memory is started again once, with what it was told; another's choice stays."""

import os
import subprocess
import sys

import pytest

from experiments import freed_memory

ASKS = "from experiments import freed_memory as f; f.keep(); import os; print(os.environ[f.VARIABLE])"


@pytest.mark.skipif(not freed_memory.environment(), reason="the C library is not glibc")
@pytest.mark.parametrize("chosen", [None, "glibc.malloc.mmap_max=7"])
def test_it_is_started_again_unless_somebody_chose(chosen):
    found = {name: value for name, value in os.environ.items() if name != freed_memory.VARIABLE}
    environment = found | ({} if chosen is None else {freed_memory.VARIABLE: chosen})
    done = subprocess.run([sys.executable, "-c", ASKS], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == (chosen or freed_memory.KEEP), done.stderr
