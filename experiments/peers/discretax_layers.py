"""Sequence mixers of discretax (JAX, Equinox); run as `clock.py` says."""

import equinox
import jax
from clock import HEADS, jax_work, main
from discretax.channel_mixers import GLU
from discretax.sequence_mixers import S4DSequenceMixer, S5SequenceMixer
from discretax.sequence_mixers.deltanet import DeltaNetSequenceMixer
from discretax.sequence_mixers.lru import LRUSequenceMixer

KEYS = jax.random.split(jax.random.key(0), 3)


def work(mixer, batch, length, width):
    arrays, static = equinox.partition(mixer, equinox.is_inexact_array)

    def run(arrays, x):
        return jax.vmap(lambda x: equinox.combine(arrays, static)(x, KEYS[0]))(x)

    x = jax.random.normal(KEYS[0], (batch, length, width))
    return jax_work(run, arrays, x, parameters=sum(a.size for a in jax.tree.leaves(arrays)))


class Gated(equinox.Module):
    """What follows the mixer in its block, and belongs to the layer in ours: GELU and GLU."""

    mixer: equinox.Module
    gate: GLU

    def __call__(self, x, key):
        return jax.vmap(self.gate)(jax.nn.gelu(self.mixer(x, key)))


def gated(Mixer, batch, length, width, state_dim):
    mixer = Mixer(width, KEYS[1], state_dim=state_dim)
    return work(Gated(mixer, GLU(width, KEYS[2])), batch, length, width)


def s5(batch, length, width):
    return gated(S5SequenceMixer, batch, length, width, width)


def lru(batch, length, width):
    return gated(LRUSequenceMixer, batch, length, width, width)


def s4d(batch, length, width):
    return gated(S4DSequenceMixer, batch, length, width, 64)


def delta_net(batch, length, width):
    return work(DeltaNetSequenceMixer(width, KEYS[1], n_heads=HEADS), batch, length, width)


if __name__ == "__main__":
    main(globals())
