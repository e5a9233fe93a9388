"""Damage to checkpoints: bits, ends, whole files, and files of other checkpoints in their place.

Of three checkpoints one or two are damaged; the loader has to say so of each, in one line, and give back the
newest of the others bit for bit, or say that there is none.
"""

import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from zoo import checkpoint

STEPS = (10, 20, 30)
Damage = Callable[[Random, dict[int, list[Path]]], set[int]]


def tree(step: int) -> Any:
    """What a small training state is made of."""
    rng = np.random.default_rng(step)
    params = {"w": rng.normal(size=(5, 3)).astype(np.float32), "b": [rng.normal(size=7).astype(np.float32)]}
    return {"params": params, "moments": {"w": np.zeros((5, 3), np.float32)}, "step": np.int32(step)}


def files(home: Path) -> dict[int, list[Path]]:
    """The files of every checkpoint that are not empty."""
    found = {step: home / f"step_{step:08d}" for step in STEPS}
    return {
        step: sorted(p for p in place.rglob("*") if p.is_file() and p.stat().st_size)
        for step, place in found.items()
    }


def _newest(random: Random, there: dict[int, list[Path]]) -> tuple[int, Path]:
    """One of the two newest checkpoints, a file of it."""
    step = random.choice(STEPS[1:])
    return step, random.choice(there[step])


def flipped(random: Random, there: dict[int, list[Path]]) -> set[int]:
    step, path = _newest(random, there)
    data = bytearray(path.read_bytes())
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    path.write_bytes(data)
    return {step}


def truncated(random: Random, there: dict[int, list[Path]]) -> set[int]:
    step, path = _newest(random, there)
    path.write_bytes(path.read_bytes()[: random.randrange(path.stat().st_size)])
    return {step}


def missing(random: Random, there: dict[int, list[Path]]) -> set[int]:
    step, path = _newest(random, there)
    path.unlink()
    return {step}


def replaced(random: Random, there: dict[int, list[Path]]) -> set[int]:
    """A file of another checkpoint, of the same name if it has one, in the place of this one's."""
    step, path = _newest(random, there)
    other = random.choice([s for s in STEPS if s != step])
    same = [p for p in there[other] if p.name == path.name]
    source = random.choice(same or there[other])
    if source.read_bytes() == path.read_bytes():
        return replaced(random, there)
    shutil.copyfile(source, path)
    return {step}


def exchanged(random: Random, there: dict[int, list[Path]]) -> set[int]:
    """Two files change places, within a checkpoint or between two: both are damaged."""
    (one, a), (two, b) = _newest(random, there), _newest(random, there)
    if a.read_bytes() == b.read_bytes():
        return exchanged(random, there)
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)
    return {one, two}


def renamed(random: Random, there: dict[int, list[Path]]) -> set[int]:
    """Two whole checkpoints change their names."""
    home = there[10][0].parents[0]
    while home.name != f"step_{STEPS[0]:08d}":
        home = home.parent
    one, two = random.sample(STEPS, 2)
    a, b, aside = (home.parent / name for name in (f"step_{one:08d}", f"step_{two:08d}", "aside"))
    a.rename(aside)
    b.rename(a)
    aside.rename(b)
    return {one, two}


KINDS: dict[str, Damage] = {
    "bit flipped": flipped,
    "file truncated": truncated,
    "file missing": missing,
    "file of another checkpoint": replaced,
    "two files exchanged": exchanged,
    "two checkpoints renamed": renamed,
}


def _restored(home: Path, damaged: set[int]) -> str:
    """What is wrong with how the loader takes it, or nothing."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        step, got, _ = checkpoint.restore(home, tree(0))
    intact = [s for s in STEPS if s not in damaged]
    if step != intact[-1]:
        return f"step {step} was restored, not {intact[-1]}"
    texts = [str(w.message) for w in said]
    passed = [s for s in reversed(STEPS) if s > step]
    named = [f"step_{s:08d} is damaged (" in text for s, text in zip(passed, texts, strict=True)]
    if not all(named) or any("\n" in text for text in texts):
        return f"unclear: {texts}"
    same = all(
        np.asarray(a).tobytes() == np.asarray(b).tobytes()
        for a, b in zip(_leaves(got), _leaves(tree(step)), strict=True)
    )
    return "" if same else f"step {step} came back changed"


def _leaves(value: Any) -> list[Any]:
    import jax

    return jax.tree.leaves(value)


def soak(cases: int, seed: int, place: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows by kind of damage, and a line for every one that went wrong."""
    good = Path(tempfile.mkdtemp(dir=place)) / "good"
    for step in STEPS:
        checkpoint.save(good, step, tree(step), keep=len(STEPS))
    rows, broken = [], list[str]()
    for order, (kind, damage) in enumerate(KINDS.items()):
        total = len(range(order, cases, len(KINDS)))
        wrong = []
        for number in range(seed, seed + total):
            home = good.with_name("case")
            shutil.copytree(good, home)
            damaged = damage(Random(f"{kind} {number}"), files(home))
            problem = _restored(home, damaged)
            wrong += [f"{kind}, case {number}: {problem}"] if problem else []
            shutil.rmtree(home)
        rows.append(
            {"damage": kind, "cases": total, "noticed": total - len(wrong), "broken promises": len(wrong)}
        )
        broken += wrong
        print(rows[-1], flush=True)
    return rows, broken
