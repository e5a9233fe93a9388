"""What the processes of one program tell each other beside their arrays; a single one has nobody to ask.

Every process must call these functions, in the same order.
"""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def first() -> bool:
    """Whether this is process 0, which writes what is written once."""
    return jax.process_index() == 0


def gather(value: Any) -> list[Any]:
    """The JSON values of all processes, in their order."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(text.size))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: text.size] = text
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def together(work: Callable[[], Any]) -> list[Any]:
    """What `work` returned, a JSON value, in every process; if it failed in one, all raise."""
    failure, answer = None, {}
    try:
        answer = {"value": work()}
    except Exception as error:  # the others wait for the answer, whatever happened here
        if jax.process_count() == 1:
            raise
        failure, answer = error, {"error": f"{type(error).__name__}: {error}"}
    answers = gather(answer)
    if failure is not None:
        raise failure
    wrong = next((number for number, told in enumerate(answers) if "error" in told), None)
    if wrong is not None:
        raise RuntimeError(f"process {wrong}: {answers[wrong]['error']}")
    return [told["value"] for told in answers]


def by_first(work: Callable[[], Any]) -> Any:
    """What `work` returned, a JSON value, in process 0, which alone does it; if it failed, all raise."""
    return together(lambda: work() if first() else None)[0]


def require_same(what: str, value: Any) -> None:
    """ValueError where processes were not given the same JSON value."""
    values = gather(value)
    other = next((number for number, found in enumerate(values) if found != values[0]), None)
    if other is not None:
        raise ValueError(f"processes 0 and {other} have different {what}: give all the same command")
