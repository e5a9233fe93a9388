"""Ten thousand steps, twice: in one life, whose memory is watched, and in lives that are killed."""

from pathlib import Path
from random import Random
from typing import Any

from experiments.config import Run
from experiments.soak.kills import Trial
from experiments.soak.lives import LENGTHS, Plan, Shared
from experiments.soak.lives import live as alive

SETTLED = 1_000  # steps after which a process has everything it needs
GROWTH = 0.05


def memory_of(path: Path) -> dict[int, int]:
    """Bytes by step, as a life has written them down."""
    rows = (line.split(",") for line in path.read_text().splitlines())
    return {int(step): int(size) for step, size in rows}


def growth(sizes: dict[int, int]) -> float:
    """Of the memory from step SETTLED to the most that it ever was later."""
    return max(size for step, size in sizes.items() if step >= SETTLED) / sizes[SETTLED] - 1


def _plans(random: Random, steps: int, kills: int) -> list[Plan]:
    """Lives that end at a step of their own, so that they share the run; the last one when it does."""
    share = 2 * steps // (kills + 2)
    plans = [
        Plan(point="a step", times=random.randint(1, share), delay=random.uniform(0, 0.02))
        for _ in range(kills)
    ]
    return [*plans, Plan()]


def soak(run: Run, kills: int, seed: int, place: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """One row of figures, and a line for every broken promise."""
    shared, broken = Shared(), list[str]()
    peace, sizes = place / "peace", place / "memory.csv"
    if alive(run, peace, Plan(), shared, memory=sizes):
        return [], ["the run in peace did not end"]
    grown, compiled = growth(memory_of(sizes)), [(shared["compiled"], shared["lengths"])]
    trial = Trial(run, place / "killed", peace)
    for plan in _plans(Random(seed), run.steps, kills):
        ended = trial.live(plan, shared)
        compiled.append((shared["compiled"], shared["lengths"]))
        print(f"life {trial.lives}: {shared['done']} of {run.steps} steps", flush=True)
        if ended or trial.broken:
            break
    if ended:
        trial.ended()
    broken += trial.broken
    if grown >= GROWTH:
        broken.append(f"memory grew by {grown:.1%} from step {SETTLED} on")
    broken += [f"{made} compilations for {lengths} lengths" for made, lengths in compiled if made != lengths]
    row = {
        "steps": run.steps,
        "kills": sum(trial.deaths.values()),
        "memory growth": round(grown, 4),
        "bytes at the end": memory_of(sizes)[max(memory_of(sizes))],
        "steps lost at most": trial.lost,
        "compilations a life": "/".join(str(made) for made, _ in compiled),
        "lengths": len(LENGTHS),
        "checkpoints kept": run.keep,
        "broken promises": len(broken),
    }
    return [row], broken
