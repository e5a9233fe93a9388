"""Complex numbers inside kernels, which have none: a tuple of the real part, or of both."""

from jax import Array

Parts = tuple[Array, ...]


def times(a: Parts, h: Parts, *, conjugate: bool) -> Parts:
    """`a h`, or `a* h`."""
    if len(a) == 1:
        return (a[0] * h[0],)
    re, im = a[0], -a[1] if conjugate else a[1]
    return re * h[0] - im * h[1], re * h[1] + im * h[0]


def plus(a: Parts, b: Parts) -> Parts:
    return tuple(x + y for x, y in zip(a, b, strict=True))
