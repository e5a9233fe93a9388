"""Compute-optimal exponents that others published: N* ~ C^a and D* ~ C^b.

They count parameters and FLOPs in different ways and train on different data; where a and b do not add up to
1, each was fitted by itself.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    architecture: str
    method: str
    a: float
    b: float
    study: str


_HOFFMANN = "Hoffmann et al. 2022, arXiv 2203.15556, table 2"
_DEEPSEEK = "DeepSeek-AI 2024, arXiv 2401.02954"
_EVO = "Nguyen et al. 2024 (Evo, DNA), doi 10.1126/science.ado9336"
_XLSTM = "Beck et al. 2025, arXiv 2510.02228"
_OLMO = "Olmo Hybrid 2026, arXiv 2604.03444"

EXPONENTS = (
    Published("Transformer", "approach 1", 0.50, 0.50, _HOFFMANN),
    Published("Transformer", "approach 2", 0.49, 0.51, _HOFFMANN),
    Published("Transformer", "approach 3", 0.46, 0.54, _HOFFMANN),
    Published("Transformer", "approach 2, first data", 0.450, 0.550, _DEEPSEEK),
    Published("Transformer", "approach 2, later data", 0.524, 0.476, _DEEPSEEK),
    Published("Transformer", "approach 2, OpenWebText2", 0.578, 0.422, _DEEPSEEK),
    Published("Transformer", "approach 2", 0.552, 0.551, _EVO),
    Published("Mamba", "approach 2", 0.388, 0.487, _EVO),
    Published("Hyena", "approach 2", 0.504, 0.499, _EVO),
    Published("StripedHyena", "approach 2", 0.483, 0.539, _EVO),
    Published("Transformer", "approach 2", 0.575, 0.424, _XLSTM),
    Published("xLSTM", "approach 2", 0.547, 0.417, _XLSTM),
    Published("Transformer", "approach 3", 0.458, 0.542, _OLMO),
    Published("attention and Gated DeltaNet", "approach 3", 0.492, 0.508, _OLMO),
    Published("Gated DeltaNet", "approach 3", 0.554, 0.446, _OLMO),
)
# What the architectures above are called here.
_KINDS = {
    "attention": "Transformer",
    "transformer": "Transformer",
    "mamba": "Mamba",
    "mamba1": "Mamba",
    "mlstm": "xLSTM",
    "xlstm": "xLSTM",
    "gated_delta_net": "Gated DeltaNet",
    "gdn": "Gated DeltaNet",
}


def of(name: str) -> tuple[Published, ...]:
    """Those of the architecture `name`; of Transformers where nothing is published for it."""
    kind = _KINDS.get(name.lower(), "Transformer")
    return tuple(row for row in EXPONENTS if row.architecture == kind)
