"""The few scans that every layer is made of: one folder per op.

Each op folder holds

* `reference.py`: the definition, a one-token `step` and its `lax.scan`;
* `xla.py`: the chunkwise matmul form that runs on any device;
* `api.py`: the public function, which picks an implementation and checks shapes.

Conventions. B batch, T time, H heads, K key width, V value width, C chunk length. Arrays are
`[B, T, H, K]`; `q` arrives scaled; log decays are natural logs <= 0; matrix states are `[B, H, K, V]`
(write `S += k v^T`, read `o = S^T q`) and at least float32. Every op takes an initial state and
`segment_ids [B, T]`, returns `(output, final_state)`, and is differentiable in everything.

Segments. Tokens interact only within runs of equal id. The initial state belongs to the segment of the
first token; the final state is that of the last token's segment.
"""
