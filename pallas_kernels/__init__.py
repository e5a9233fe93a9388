"""The few scans that every layer is made of: one folder per op.

Each op folder holds

* `reference.py`: the definition, a one-token `step` and its `lax.scan`;
* `xla.py`: the chunkwise matmul form that runs on any device;
* `tpu.py`, `gpu.py`, where they exist: Pallas kernels, forward and backward, for TPUs and for Hopper GPUs;
* `api.py`: the public function, which picks an implementation (`dispatch.py`) and checks shapes.

Beside the folders stands what ops share. `chunks`, `decay`, `triangular`, `phases`, `orthogonal`,
`feature_maps` and `sequence` are plain JAX; files that begin with `tpu_` or `gpu_` are parts of kernels for
that platform.

Conventions. B batch, T time, H heads, K key width, V value width, C chunk length. Arrays are
`[B, T, H, K]`; `q` arrives scaled; log decays are natural logs <= 0; matrix states are `[B, H, K, V]`
(write `S += k v^T`, read `o = S^T q`) and at least float32. Every op takes an initial state and
`segment_ids [B, T]`, returns `(output, final_state)`, and is differentiable in everything.

Shards. Inside `jax.shard_map` an op may hold a part of the time: `sequence.along` makes it go on from the
state that the devices before it leave.

Segments. Tokens interact only within runs of equal id. The initial state belongs to the segment of the
first token; the final state is that of the last token's segment.
"""
