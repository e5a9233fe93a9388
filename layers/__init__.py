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

Names of parameters carry meaning for the optimiser:
`w_*` are weight matrices (decayed; `w_out` is the projection back to the model width, which a model scales
by its depth); `ssm_*` are the dynamics of a time-invariant state space (no decay, their own learning rate);
everything else (norm scales, biases, `A_log`, `dt_bias`, `D`, gates, initial memories) is not decayed.
"""
