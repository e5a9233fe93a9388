"""Any layer or model as a `flax.nnx.Module`; the functions stay the only implementation.

    from flax import nnx
    from zoo import lm
    from zoo.nnx import Module

    model = Module(lm.Config(vocab_size=256, pattern=("mamba",)), rngs=nnx.Rngs(0))
    logits = model(tokens)                       # apply, from the empty state
    logits = model(tokens, carry=True)           # from where it stopped, and it stops further on
    logits = model.step(token)                   # one more token
    model.reset(batch=4)                         # the empty state of four sequences

Parameters are `nnx.Param`s in the tree that `init` gives, the state is one `Memory` (an `nnx.Variable`), so
that optimizers, `nnx.split`, `nnx.jit`, `nnx.grad` and `nnx.tabulate` find what they look for.
`model.functional` is the tree for the functions, as checkpoints and generation take it.

A linen model needs no adapter: what `init` gives is one parameter of it.

    class Linen(linen.Module):
        cfg: lm.Config

        @linen.compact
        def __call__(self, tokens):
            params = self.param("zoo", lm.init, self.cfg)
            return lm.apply(params, self.cfg, tokens)[0]
"""

from typing import Any

import jax
from flax import nnx
from jax import Array

from layers.checks import require
from zoo import registry


class Memory(nnx.Variable):
    """What a layer or a model remembers: its `State`, or several, as one value."""


class Module(nnx.Module):
    """The layer or the model of the Config `cfg`.

    Parameters are drawn from `rngs` (its stream `params`), or are `params`, a tree as `init` gives it. The
    state is that of `batch` sequences. Raises ValueError for anything that is no Config, and without either
    of `rngs` and `params`.
    """

    def __init__(self, cfg: Any, *, rngs: nnx.Rngs | None = None, params: Any = None, batch: int = 1):
        require((rngs is None) != (params is None), "nnx.Module: give either rngs or params")
        self.cfg = cfg
        if rngs is not None:
            params = self._module.init(rngs.params(), cfg)
        self.params = nnx.data(jax.tree.map(nnx.Param, params))
        self.state = Memory(self._empty(batch))

    @property
    def _module(self) -> Any:
        return registry.module(self.cfg)

    def _empty(self, batch: int) -> Any:
        make = getattr(self._module, "init_state", None)  # a model that reads its input whole has none
        return None if make is None else make(self.cfg, batch)

    @property
    def functional(self) -> Any:
        """The parameters as plain arrays, arranged as `init` arranges them."""
        return jax.tree.map(
            lambda p: p.get_value(), self.params, is_leaf=lambda p: isinstance(p, nnx.Variable)
        )

    def reset(self, batch: int) -> None:
        """Forget: the empty state of `batch` sequences."""
        self.state.set_value(self._empty(batch))

    def __call__(self, x: Array, *, carry: bool = False, with_aux: bool = False, **settings) -> Any:
        """`apply`: its first result, or `(result, aux)`; `settings` are its `segment_ids` and so on.

        From the empty state, and the module's own stays as it is; with `carry` from the module's, which
        becomes that after the last token.
        """
        if carry:
            settings["state"] = self.state.get_value()
        y, state, aux = self._module.apply(self.functional, self.cfg, x, **settings)
        if carry:
            self.state.set_value(state)
        return (y, aux) if with_aux else y

    def step(self, x_t: Array, **settings) -> Array:
        """One token `[B]` or `[B, D]`, from the module's state, which goes on."""
        y_t, state = self._module.step(self.functional, self.cfg, x_t, self.state.get_value(), **settings)
        self.state.set_value(state)
        return y_t
