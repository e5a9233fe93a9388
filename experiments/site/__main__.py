"""Write the sources of the site, and have MkDocs build it: `python -m experiments.site [FOLDER]`."""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

# Pictures are nearly all compilation; their arithmetic is nothing. Before jax is imported.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from experiments.site import architectures, pages, picture, reference

HERE = Path(__file__).parent
PICTURES = HERE.parents[1] / "runs" / ".pictures"
FORMS = {
    "blocks": "Attention",
    "convolution": "Convolutions",
    "scan": "Scans",
    "chunkwise": "Chunkwise",
    "sequential": "Sequential",
}


def _write(path: Path, text: str) -> None:
    """Only what is new, so that a server that watches the folder builds no more than that."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def sources() -> dict[str, str]:
    """Path and text of all files."""
    about, found = architectures.load(), architectures.modules()
    files = {path.name: pages.written(path) for path in sorted((HERE / "pages").glob("*.md"))}
    files |= {f"assets/{path.name}": path.read_text() for path in sorted((HERE / "assets").iterdir())}
    files |= {f"reference/{name}.md": reference.page(name) for name in reference.PAGES}
    files["architectures/index.md"] = files.pop("architectures.md") + "\n" + pages.gallery(found, about)
    for module, names in found.items():
        files[f"architectures/{module}.md"] = pages.architecture(module, names, about[module])
        files[f"architectures/{module}.svg"] = picture.svg(names[0], about[module].drawing, PICTURES)
    return files


def navigation() -> list[dict]:
    """Pages in order: architectures by the form they compute in."""
    by_form: dict[str, list] = {title: [] for title in FORMS.values()}
    about = architectures.load()
    for module, names in architectures.modules().items():
        form = FORMS[architectures.registry.LAYERS[names[0]].form]
        by_form[form].append({about[module].name: f"architectures/{module}.md"})
    groups = [{title: listed} for title, listed in by_form.items() if listed]
    return [
        {
            "Start": [
                "index.md",
                {"A first model": "tutorial.md"},
                {"A layer of your own": "adding_a_layer.md"},
            ]
        },
        {"Architectures": ["architectures/index.md", *groups]},
        {"Arena": [{"The arena": "arena.md"}]},
        {"Scale": [{"Scale": "scale.md"}]},
        {"Reference": [{reference.PAGES[name][0]: f"reference/{name}.md"} for name in reference.PAGES]},
    ]


def write(work: Path) -> Path:
    """The sources and their configuration, which it returns; what is no longer made goes."""
    files = sources()
    for path in (work / "docs").rglob("*"):
        if path.is_file() and str(path.relative_to(work / "docs")) not in files:
            path.unlink()
    for name, text in files.items():
        _write(work / "docs" / name, text)
    settings = {"INHERIT": str(HERE / "mkdocs.yml"), "docs_dir": "docs", "nav": navigation()}
    _write(work / "mkdocs.yml", json.dumps(settings, indent=1))
    return work / "mkdocs.yml"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.site", description=__doc__)
    parser.add_argument("folder", nargs="?", default="runs/site", type=Path, help="default runs/site")
    folder = parser.parse_args().folder.resolve()
    if shutil.which("mkdocs", path=str(Path(sys.executable).parent)) is None:
        sys.exit("error: the site needs MkDocs: pip install '.[site]'")
    settings = write(folder.with_name(f".{folder.name}"))
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict"]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    # MkDocs looks for the modules of the reference from where it runs.
    return subprocess.run(
        [*command, "--config-file", settings, "--site-dir", folder], cwd=HERE.parents[1], env=quiet
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
