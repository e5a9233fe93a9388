"""Fields that came when configs had already been written down."""

from dataclasses import field
from typing import Any


def later(default: Any) -> Any:
    """A field that is not written while it has its default, so that older runs keep their addresses."""
    return field(default=default, metadata={"later": True})
