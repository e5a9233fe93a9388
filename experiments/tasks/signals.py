"""Real-valued sequences to classify: a noisy shape somewhere in a longer signal, or arrays from a file.

`SignalData` draws for every class one smooth shape in F channels,

    g_c(s) = sum_{h=1..6} a_{c,h} sin(pi h s) / h^(1/2),   0 < s < 1,   a normal, g_c of unit mean square,

and an example is `x(t) = A g_c((t - t0) / w) + noise`, where start t0, width w and amplitude A vary from
example to example: what tells the classes apart is the order of the values, not where or how large they are
(the idea of MNIST-1D, Greydanus and Kobak, 2020). `shuffled=True` applies one fixed permutation to time: the
information stays, the locality goes.

    SignalData(length=64, classes=10).build()
    ArrayData(path="mnist1d.npz").build()
"""

import math
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.sources import (
    Batch,
    GeneratedSource,
    Stream,
    batches_of,
    below,
    fingerprint,
    random_words,
    require_at_least,
    require_split,
    require_types,
    shuffled_indices,
    uniform,
)
from experiments.tokenizer import first_line
from layers.checks import require

HARMONICS = np.arange(1, 7)
# An .npz file that unpacks to more than SMALL bytes and to more than so many times its size is refused.
LARGEST_FACTOR, SMALL = 200, 2**28


@dataclass(frozen=True, kw_only=True)
class SignalData:
    """Generated signals of `classes` shapes.

    `train_examples` is the size of a fixed training pool, gone through in a new order every epoch, or 0 for
    examples that never repeat. `noise` is the standard deviation of white noise; shapes have mean square 1.
    """

    length: int = 64
    features: int = 1
    classes: int = 10
    train_examples: int = 4_000
    eval_examples: int = 1_000
    noise: float = 0.3
    shuffled: bool = False
    data_seed: int = 0

    def __post_init__(self):
        require_types(self)
        require_at_least(self, 1, "features", "eval_examples")
        require_at_least(self, 2, "classes")
        require_at_least(self, 16, "length")
        require_at_least(self, 0, "train_examples", "noise", "data_seed")

    def build(self) -> "SignalSource":
        """The source; examples are made when first asked for."""
        return SignalSource(self)


class SignalSource(GeneratedSource):
    """Batches `{"inputs" [B,T,F] float32, "targets" [B] int32}`."""

    kind = "classification"

    def __init__(self, cfg: SignalData):
        super().__init__(cfg, 4 + cfg.length * cfg.features)
        self.features = cfg.features
        self.classes = cfg.classes
        self.chance = 1 / cfg.classes
        self.shapes = _shapes(cfg)
        self._time = time_order(cfg.length, cfg.data_seed, cfg.shuffled)

    def make(self, words: np.ndarray) -> Batch:
        """The examples that rows of random words stand for."""
        length, features = self.length, self.features
        targets = below(words[:, 0], self.classes)
        width = length * (0.4 + 0.3 * uniform(words[:, 1:2]))
        start = (length - width) * uniform(words[:, 2:3])
        amplitude = 0.75 + 0.5 * uniform(words[:, 3, None, None])
        signal = self.render(targets, (np.arange(length) - start) / width)
        noise = normal(words[:, 4 : 4 + length * features]).reshape(-1, length, features)
        inputs = amplitude * signal + self.cfg.noise * noise
        return {"inputs": inputs[:, self._time].astype(np.float32), "targets": targets.astype(np.int32)}

    def render(self, classes: np.ndarray, s: np.ndarray) -> np.ndarray:
        """Shapes of `classes [B]` at places `s [B,T]`, zero outside (0, 1): `[B,T,F]`."""
        waves = np.sin(math.pi * s.clip(0, 1)[..., None] * HARMONICS)
        return np.einsum("bth,bfh->btf", waves, self.shapes[classes])

    def describe(self) -> str:
        """One line for people."""
        cfg = self.cfg
        pool = f"{cfg.train_examples:,} training examples" if cfg.train_examples else "fresh examples"
        return (
            f"{'shuffled ' if cfg.shuffled else ''}signals: {cfg.classes} shapes in {cfg.length} steps of "
            f"{cfg.features} features, noise {cfg.noise}, {pool}, chance {self.chance:.2%}"
        )


@dataclass(frozen=True, kw_only=True)
class ArrayData:
    """Sequences from an .npz file: `x [n,T]` or `[n,T,F]`, `y [n]`, perhaps `x_test` and `y_test`.

    The last `1 - train_fraction` of x, y is for validation. Inputs are standardised by the training part.
    """

    path: str
    train_fraction: float = 0.9
    shuffled: bool = False
    data_seed: int = 0

    def __post_init__(self):
        require_types(self)
        require_at_least(self, 0, "data_seed")
        require(0 < self.train_fraction < 1, f"ArrayData: train_fraction={self.train_fraction} not in (0, 1)")

    def build(self) -> "ArraySource":
        """Read the file. FileNotFoundError or ValueError, one line, for what cannot be."""
        arrays = _read_arrays(self.path)
        total, cut = len(arrays["x"]), int(self.train_fraction * len(arrays["x"]))
        require(0 < cut < total, f"{self.path}: {total} sequences are too few to split")
        parts = {name: (arrays["x"][here], arrays["y"][here]) for name, here in _halves(cut).items()}
        if "x_test" in arrays:
            parts["test"] = (arrays["x_test"], arrays["y_test"])
        time = time_order(arrays["x"].shape[1], self.data_seed, self.shuffled)
        settings = {"train_fraction": self.train_fraction, "order": time.tolist()}
        content = fingerprint(settings, *(arrays[name] for name in sorted(arrays)))
        return ArraySource(self, f"{self.path}{' shuffled' if self.shuffled else ''}", parts, time, content)


class ArraySource:
    """Batches `{"inputs" [B,T,F] float32, "targets" [B] int32}` of given arrays.

    `parts` has `(x [n,T,F], y [n])` under "train" and the names of the splits, `time [T]` the order in which
    the places of a sequence come.
    """

    kind = "classification"

    def __init__(self, cfg, title: str, parts: dict[str, tuple], time: np.ndarray, content: str):
        self.cfg, self.title, self.fingerprint = cfg, title, content
        x = parts["train"][0]
        _, self.length, self.features = x.shape
        self.classes = int(max(y.max() for _, y in parts.values())) + 1
        self.chance = 1 / self.classes
        self.splits = tuple(name for name in parts if name != "train")
        mean, deviation = x.mean((0, 1)), x.std((0, 1)) + 1e-8

        def part(x: np.ndarray, y: np.ndarray) -> Batch:
            inputs = (x[:, time] - mean) / deviation
            return {"inputs": inputs.astype(np.float32), "targets": y.astype(np.int32)}

        self._parts = {name: part(*arrays) for name, arrays in parts.items()}

    def batch(self, seed: int, step: int, size: int) -> Batch:
        """Training batch number `step`: a pure function of its arguments."""
        train = self._parts["train"]
        indices = shuffled_indices(seed, len(train["targets"]), step * size, size)
        return {name: x[indices] for name, x in train.items()}

    def eval_batches(self, split: str, size: int) -> Iterator[Batch]:
        """The split in the order of the file."""
        require_split(self.splits, split)
        return batches_of(self._parts[split], size)

    def describe(self) -> str:
        """One line for people."""
        sizes = ", ".join(f"{len(part['targets']):,} {name}" for name, part in self._parts.items())
        return (
            f"{self.title}: {sizes} sequences of {self.length} steps, {self.features} features, "
            f"{self.classes} classes, chance {self.chance:.2%}"
        )


def normal(words: np.ndarray) -> np.ndarray:
    """Random words as standard normals (Box and Muller), one from the two halves of each."""
    radius = ((words >> np.uint64(32)).astype(np.float64) + 0.5) * 2.0**-32
    angle = (words & np.uint64(2**32 - 1)).astype(np.float64) * (2 * math.pi * 2.0**-32)
    return np.sqrt(-2 * np.log(radius)) * np.cos(angle)


def _shapes(cfg: SignalData) -> np.ndarray:
    """Coefficients `[classes, F, 6]` of the sine series; the mean square over (0, 1) is half their sum."""
    size = (cfg.classes, cfg.features, len(HARMONICS))
    a = normal(random_words(math.prod(size), Stream.TASK, cfg.data_seed)).reshape(size) / np.sqrt(HARMONICS)
    return a / np.sqrt(0.5 * np.square(a).sum(-1, keepdims=True))


def time_order(length: int, seed: int, shuffled: bool) -> np.ndarray:
    """Places in time, in order, or in one random order that belongs to `seed`."""
    if not shuffled:
        return np.arange(length)
    return np.argsort(random_words(length, Stream.TASK, seed, salt=1), kind="stable")


def _halves(cut: int) -> dict[str, slice]:
    return {"train": slice(None, cut), "validation": slice(cut, None)}


def _require_no_bomb(file: Path) -> None:
    """What a small file says it unpacks to fits in memory: numbers do not compress a thousandfold."""
    with zipfile.ZipFile(file) as archive:
        size = sum(about.file_size for about in archive.infolist())
    most = max(LARGEST_FACTOR * file.stat().st_size, SMALL)
    require(size <= most, f"its {file.stat().st_size:,} bytes unpack to {size:,}")


def _read_arrays(path: str) -> dict[str, np.ndarray]:
    """`x` with a feature axis, `y`, and `x_test`, `y_test` if there; ValueError for what is malformed."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        _require_no_bomb(file)
        with np.load(file, allow_pickle=False) as content:
            arrays = {name: content[name] for name in ("x", "y", "x_test", "y_test") if name in content}
            names = ", ".join(sorted(content))
    except Exception as error:  # zip, pickle and numpy errors of many types
        raise ValueError(f"{path}: not a readable .npz of numbers: {first_line(error)}") from None
    require({"x", "y"} <= arrays.keys(), f"{path}: needs arrays x and y; there are: {names}")
    require(("x_test" in arrays) == ("y_test" in arrays), f"{path}: x_test and y_test go together")
    for end in ("", "_test") if "x_test" in arrays else ("",):
        x, y = arrays[f"x{end}"], arrays[f"y{end}"]
        numbers = np.issubdtype(x.dtype, np.number) and np.issubdtype(y.dtype, np.integer)
        require(numbers, f"{path}: x{end} must be real and y{end} integer, not {x.dtype} and {y.dtype}")
        fit = x.ndim in (2, 3) and y.ndim == 1 and len(x) == len(y) and y.min(initial=0) >= 0
        require(fit, f"{path}: x{end} {x.shape} and y{end} {y.shape} are not [n,T(,F)] and [n] from 0 up")
        require(bool(np.isfinite(x).all()), f"{path}: x{end} is not finite everywhere")
        arrays[f"x{end}"] = x if x.ndim == 3 else x[..., None]
    return arrays
