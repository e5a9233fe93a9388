"""What several families have in common: the ends of a model, MLPs, mixtures of experts, attention."""

from typing import Any

from layers import attention
from zoo import lm
from zoo.blocks import Block
from zoo.pretrained.links import Link, expert, matrix, same


def trunk(blocks: list[Block], first: int = 0) -> dict[str, Any]:
    """`pattern` and `depth` of an lm.Config with these blocks: the shortest pattern that repeats, above the
    `first` ones."""
    depth = len(blocks)
    above = blocks[first:] or blocks
    lengths = range(1, len(above) + 1)
    period = next(p for p in lengths if all(block == above[i % p] for i, block in enumerate(above)))
    more = {"first": tuple(blocks[:first])} if first else {}
    return {"pattern": tuple(above[:period]), "depth": depth, "mlp": "none", **more}


def ends(cfg: lm.Config, embed: str, norm: str, head: str = "lm_head.weight") -> list[Link]:
    """Embedding, final norm and, where it is not tied, the head."""
    links = [same("w_embed", embed), same("norm_final", norm)]
    return links if cfg.tie else [*links, matrix("w_head", head)]


def norms(mixer: str = "input_layernorm", channels: str = "post_attention_layernorm") -> list[Link]:
    """A block's two norms."""
    return [same("norm_mixer", f"{mixer}.weight"), same("norm_mlp", f"{channels}.weight")]


GATED = ("gate_proj", "up_proj", "down_proj")


def gated_mlp(hidden: int, prefix: str = "mlp/", names: tuple[str, str, str] = GATED) -> list[Link]:
    """SwiGLU or GEGLU without biases: their gate, value and output projections."""
    gate, up, down = names
    return [
        matrix(f"{prefix}w_in", f"{gate}.weight", 0, hidden),
        matrix(f"{prefix}w_in", f"{up}.weight", hidden),
        matrix(f"{prefix}w_out", f"{down}.weight"),
    ]


def experts(count: int, hidden: int, names: tuple[str, str, str], router: str = "gate.weight") -> list[Link]:
    """A mixture of gated MLPs, one module each, and its router."""
    gate, up, down = names
    links = [matrix("mlp/w_router", router)]
    for number in range(count):
        at = f"experts.{number}"
        links += [
            expert("mlp/w_in", f"{at}.{gate}.weight", number, 0, hidden),
            expert("mlp/w_in", f"{at}.{up}.weight", number, hidden),
            expert("mlp/w_out", f"{at}.{down}.weight", number),
        ]
    return links


def attention_projections(layer: attention.Config, prefix: str = "mixer/") -> list[Link]:
    """Keys and values of G heads, queries of H, and the way out."""
    q, k = layer.heads * layer.K, layer.G * layer.K
    return [
        matrix(f"{prefix}w_qkv", "q_proj.weight", 0, q),
        matrix(f"{prefix}w_qkv", "k_proj.weight", q, q + k),
        matrix(f"{prefix}w_qkv", "v_proj.weight", q + k),
        matrix(f"{prefix}w_out", "o_proj.weight"),
    ]
