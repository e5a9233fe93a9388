"""The M highest scores so far, at every token."""

from pallas_kernels.running_top.api import Top, running_top

__all__ = ["Top", "running_top"]
