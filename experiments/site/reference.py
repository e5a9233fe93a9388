"""Pages of reference: which modules stand on which page. The rest is in their docstrings."""

from pathlib import Path

ROOT = Path(__file__).parents[2]


def ops() -> list[str]:
    """The entry of every op of pallas_kernels."""
    return [
        f"pallas_kernels.{path.parent.name}.api"
        for path in sorted((ROOT / "pallas_kernels").glob("*/api.py"))
    ]


# Page -> title, what it is about, modules.
PAGES: dict[str, tuple[str, str, list[str]]] = {
    "models": (
        "Models",
        "Layers by name, and whole models of them.",
        [
            "zoo.registry",
            "zoo.blocks",
            "zoo.lm",
            "zoo.classifier",
            "zoo.autoencoder",
            "zoo.presets",
            "zoo.nnx",
        ],
    ),
    "generation": (
        "Generation and states",
        "Writing with a model, and keeping what it remembers.",
        ["zoo.generation.api", "zoo.generation.sampling", "zoo.generation.session", "zoo.states"],
    ),
    "weights": ("Weights", "Published weights and checkpoints.", ["zoo.pretrained", "zoo.checkpoint"]),
    "layers": (
        "Parts of layers",
        "The contract of a layer, and what layers share.",
        [
            "layers",
            "layers.common",
            "layers.heads",
            "layers.state_spaces",
            "layers.memories",
            "layers.routing",
            "layers.checks",
            "layers.fields",
        ],
    ),
    "ops": (
        "Ops",
        "The scans that layers are made of.",
        ["pallas_kernels", "pallas_kernels.dispatch", *ops()],
    ),
    "training": (
        "Training",
        "What a run is, and the loop that trains it.",
        [
            "experiments.config",
            "experiments.train",
            "experiments.evaluate",
            "experiments.optimizer",
            "experiments.sources",
            "experiments.text",
            "experiments.tokenizer",
            "experiments.samples",
        ],
    ),
    "comparisons": (
        "Comparisons and sweeps",
        "Many runs under one budget, and findings trained again.",
        [
            "experiments.compare",
            "experiments.budget",
            "experiments.grid",
            "experiments.sweep",
            "experiments.reproduce",
            "experiments.bench",
        ],
    ),
    "scaling": (
        "Scaling laws",
        "L(N, D) = E + A / N^α + B / D^β, fitted to runs.",
        [
            "experiments.scaling.data",
            "experiments.scaling.law",
            "experiments.scaling.varpro",
            "experiments.scaling.huber",
            "experiments.scaling.profiles",
            "experiments.scaling.study",
        ],
    ),
    "scale": (
        "Many devices",
        "Where arrays lie, and sequences that are cut over devices.",
        ["experiments.mesh", "zoo.sharding", "zoo.sequence", "zoo.shards"],
    ),
}


def page(name: str) -> str:
    title, about, modules = PAGES[name]
    return "\n\n".join([f"# {title}", about, *(f"::: {module}" for module in modules)]) + "\n"
