"""JSON that somebody else may have written: its value, or one line that says what is wrong with it.

Nothing is executed, no size or depth takes the memory or the interpreter with it, and what is no regular file
(a pipe would never end) is not opened.
"""

import json
from pathlib import Path
from typing import Any

from layers.checks import require

MOST_BYTES = 2**28
DEEPEST = 100  # arrays and objects within each other


def parse(text: str | bytes, where: str | Path) -> Any:
    """The JSON value `text`; ValueError, one line that begins with `where`, for anything else."""
    try:
        # UTF-8 and nothing else: of other encodings the library would guess which, and import it.
        value = json.loads(text.decode().removeprefix("\ufeff") if isinstance(text, bytes) else text)
    except RecursionError:
        raise ValueError(f"{where} is refused: its JSON is nested too deeply") from None
    except ValueError as error:  # no JSON, no UTF-8, a number of thousands of digits
        raise ValueError(f"{where} is not JSON: {' '.join(str(error).split())}") from None
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return value
    raise ValueError(f"{where} is refused: its JSON is nested too deeply")


def _inside(value: Any) -> list[Any]:
    """What stands in an array or an object."""
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def read_json(path: Path) -> Any:
    """The JSON value in a file. FileNotFoundError where no regular file is, else as `parse`."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    size = path.stat().st_size
    require(size <= MOST_BYTES, f"{path} is refused: {size:,} bytes of JSON")
    return parse(path.read_bytes(), path)


def read_object(path: Path, *names: str) -> dict[str, Any]:
    """As `read_json`, for an object that has `names`."""
    value = read_json(path)
    require(isinstance(value, dict), f"{path} does not hold a JSON object")
    missing = [name for name in names if name not in value]
    require(not missing, f"{path} lacks {', '.join(missing)}")
    return value
