"""One file per architecture: pure functions over pytrees, all to one contract.

A layer is a module with

    Config                                   frozen dataclass, validates itself, a static argument of jit
    init(key, cfg) -> params                 nested dict of float32 arrays
    init_state(cfg, batch) -> State          flax.struct.dataclass: the whole memory of the past
    apply(params, cfg, x, state=None, *, segment_ids=None, implementation=None) -> (y, State, aux)
    step(params, cfg, x_t, state) -> (y_t, State)

`x` is `[B, T, D]` (D = `cfg.width`), `x_t` is `[B, D]`; y has x's dtype; states are float32 (float64 under
x64). `segment_ids [B, T]` marks packed documents: nothing crosses from one run of equal ids to the next;
a given state belongs to the first token's segment and the returned one to the last token's.
`aux` is a dict: entries `*_loss` are added to the training loss, the rest are diagnostics.

Every `Config` has `width` and answers two questions from numbers alone:
`state_bytes()` (float32, one sequence) and `flops_per_token(length)` (forward, one token of a sequence of
`length`, one multiply-add = 2 FLOPs, as executed by the chunkwise form).

A Config may have `over_depth`, functions of parameters by name: a model puts its layers' arrays
`[layers, ...]`, bottom to top, through them and gives each layer its row of what comes out.

A Config may have `side`, a number of channels. Where it is not 0, `apply` and `step` also take
`side [B,T,side]` or `[B,side]`, which blocks hand upwards at every token, 0 below the first that does, and
then return as their last value what the next block is to get. Without it they return what others do.

A sequence may be cut over devices (`zoo/shards.py`). Any layer works then, by taking turns. One whose ops,
convolutions and token shifts are those of this package, and which reads nothing of its state but what it
hands to them, needs no turns: its Config says `sequence_way = "scan"` ("halo" where the state is a window,
"ring" where it is the whole past).

Names of parameters carry meaning for the optimiser:
`w_*` are weight matrices (decayed; `w_out` is the projection back to the model width, which a model scales
by its depth); `ssm_*` are the dynamics of a time-invariant state space (no decay, their own learning rate);
everything else (norm scales, biases, `A_log`, `dt_bias`, `D`, gates, initial memories) is not decayed.
"""
