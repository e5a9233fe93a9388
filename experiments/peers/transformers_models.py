"""Generation by Hugging Face transformers on the CPU, in an interpreter that need not have this project.

    PYTHON transformers_models.py NAME WIDTH DEPTH VOCABULARY CONTEXT TOKENS

NAME is a function of this script. Prints one JSON line: seconds to read a prompt of CONTEXT tokens, seconds
of each of the TOKENS that follow it (greedy, batch 1), bytes that both took beyond the model, parameters.
"""

import json
import sys
import time

import resident
import torch
import transformers

WARM = 8  # tokens of the prompt of a first call


class Clock:
    """A streamer that notes when tokens come; the prompt comes first."""

    def __init__(self):
        self.times = []

    def put(self, tokens):
        self.times.append(time.perf_counter())

    def end(self):
        pass


def mamba(width, depth, vocabulary):
    config = transformers.MambaConfig(hidden_size=width, num_hidden_layers=depth, vocab_size=vocabulary)
    return transformers.MambaForCausalLM(config)


def mamba2(width, depth, vocabulary):
    config = transformers.Mamba2Config(
        hidden_size=width, num_hidden_layers=depth, vocab_size=vocabulary, num_heads=2 * width // 64,
        head_dim=64, n_groups=1, state_size=128, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.Mamba2ForCausalLM(config)


def recurrent_gemma(width, depth, vocabulary):
    config = transformers.RecurrentGemmaConfig(
        hidden_size=width, num_hidden_layers=depth, vocab_size=vocabulary, lru_width=width,
        intermediate_size=6 * width, num_attention_heads=4, num_key_value_heads=1,
        attention_window_size=2048, block_types=("recurrent", "recurrent", "attention"),
    )  # fmt: skip
    return transformers.RecurrentGemmaForCausalLM(config)


def generate(model, prompt, tokens, streamer=None):
    model.generate(
        prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, use_cache=True,
        attention_mask=torch.ones_like(prompt), pad_token_id=0, eos_token_id=None, streamer=streamer,
    )  # fmt: skip


def main(name, *sizes):
    width, depth, vocabulary, context, tokens = map(int, sizes)
    torch.manual_seed(0)
    model = globals()[name](width, depth, vocabulary).eval()
    prompt = torch.randint(1, vocabulary, (1, context))
    before = resident.present()
    generate(model, prompt[:, :WARM], 4)
    resident.forget()
    clock, start = Clock(), time.perf_counter()
    generate(model, prompt, tokens + 1, clock)
    first, last = clock.times[1], clock.times[-1]
    row = {
        "prefill": first - start,
        "decode": (last - first) / tokens,
        "memory": resident.peak() - before,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main(*sys.argv[1:])
