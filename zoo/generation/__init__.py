"""Generation: prompts in parallel form, then token after token in one compiled loop, in constant memory.

tokens = generate(params, cfg, [[5, 7, 2], [3]], 100, temperature=0)           # rows of unequal length
text = generate(params, cfg, "def ", 100, tokenizer=tokenizer, top_p=0.9, stop="\\n\\n")
for part in stream(params, cfg, "def ", 100, tokenizer=tokenizer): print(part, end="")
answers, session = generate(..., with_session=True)                            # and on from `session=`
document = prefill(params, cfg, long_text_tokens, piece=1024)                  # read once, asked often
"""

from zoo.generation.api import Stream, encoded, generate, stream
from zoo.generation.reading import prefill
from zoo.generation.sampling import Sampling, greedy, min_p, penalised, top_k, top_p
from zoo.generation.session import Session

__all__ = [
    "Sampling", "Session", "Stream", "encoded", "generate", "greedy", "min_p", "penalised", "prefill",
    "stream", "top_k", "top_p",
]  # fmt: skip
