"""Generation by Hugging Face transformers on the CPU, in an interpreter that need not have this project.

    PYTHON transformers_models.py save NAME WIDTH DEPTH VOCABULARY FOLDER
    PYTHON transformers_models.py NAME WIDTH DEPTH VOCABULARY TOKENS ROUNDS FOLDER CONTEXT...

NAME is a function of this script. The first line saves such a model with random weights. The second reads
prompts of CONTEXT random tokens with it and goes on with them (greedy, batch 1, one call of `generate` each),
and answers in JSON lines as `experiments/generate_worker.py` does. It uses as many threads as are quickest
here, up to all cores.
"""

import json
import sys
import time

import numpy as np
import resident
import torch
import transformers

WARM = 8  # tokens of the prompt of a first call


class Gate:
    """A streamer that tells the time of the prompt, then of `size` tokens at a time; it waits to be asked."""

    def __init__(self, size, rounds):
        self.size, self.rounds, self.start, self.busy, self.tokens = size, rounds, None, 0.0, None

    def put(self, tokens):
        now = time.perf_counter()
        if self.start is None:  # the prompt itself: nothing has been done
            pass
        elif self.tokens is None:
            say(prefill=now - self.start, first=tokens.tolist())
            self.tokens = []
        else:
            self.tokens += tokens.tolist()
            if len(self.tokens) < self.size:
                return
            busy = (time.process_time() - self.busy) / self.size
            say(decode=(now - self.start) / self.size, busy=busy, tokens=self.tokens)
            self.tokens, self.rounds = [], self.rounds - 1
        if self.rounds:
            sys.stdin.readline()
        self.start, self.busy = time.perf_counter(), time.process_time()

    def end(self):
        pass


def say(**values):
    print(json.dumps(values), flush=True)


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


def quickest_threads(model, prompt):
    """On a machine with other work, threads that wait for each other can cost more than they bring."""
    seconds = {}
    for threads in range(1, torch.get_num_threads() + 1):
        torch.set_num_threads(threads)
        generate(model, prompt, 2)
        tries = []
        for _ in range(5):
            start = time.perf_counter()
            generate(model, prompt, WARM)
            tries.append(time.perf_counter() - start)
        seconds[threads] = min(tries)
    return min(seconds, key=seconds.get)


def save(name, width, depth, vocabulary, folder):
    torch.manual_seed(0)
    globals()[name](int(width), int(depth), int(vocabulary)).save_pretrained(folder)


def main(name, *arguments):
    _, _, vocabulary, tokens, rounds = map(int, arguments[:5])
    model = transformers.AutoModelForCausalLM.from_pretrained(arguments[5], dtype=torch.float32).eval()
    before = resident.present()
    prompt = torch.randint(1, vocabulary, (1, WARM))
    threads = quickest_threads(model, prompt)
    torch.set_num_threads(threads)
    say(parameters=sum(p.numel() for p in model.parameters()), threads=threads)
    for context in map(int, arguments[6:]):
        resident.forget()
        prompt = torch.tensor(np.random.default_rng(0).integers(1, vocabulary, (1, context)))
        generate(model, prompt, rounds * tokens + 1, Gate(tokens, rounds))
        say(memory=resident.peak() - before)


if __name__ == "__main__":
    resident.limit()
    {"save": save}.get(sys.argv[1], lambda *rest: main(sys.argv[1], *rest))(*sys.argv[2:])
