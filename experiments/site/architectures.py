"""What is said of each architecture beside its code: `architectures/MODULE.toml`."""

import tomllib
from pathlib import Path

import msgspec

from zoo import registry

FOLDER = Path(__file__).parent / "architectures"


class Citation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A publication; `venue` and `url` where there is no arXiv number."""

    authors: str
    title: str
    year: int
    arxiv: str = ""
    venue: str = ""
    url: str = ""

    def bibtex(self, key: str) -> str:
        place = {"eprint": self.arxiv, "archivePrefix": "arXiv" if self.arxiv else ""}
        said = {"title": self.title, "author": self.authors, "year": str(self.year), **place}
        said |= {"howpublished": self.venue, "url": self.url}
        lines = [f"  {name} = {{{value}}}," for name, value in said.items() if value]
        return "\n".join([f"@misc{{{key},", *lines, "}"])

    def markdown(self) -> str:
        address = f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else self.url
        title = f"[{self.title}]({address})" if address else self.title
        number = f"arXiv {self.arxiv}" if self.arxiv else self.venue
        return ". ".join(filter(None, [f"{self.authors} ({self.year})", title, number])) + "."


class Architecture(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file: its name in the field, when to use it (Markdown), a drawing (`layout`), whom to cite."""

    name: str
    use: str
    drawing: str
    citation: Citation


def modules() -> dict[str, list[str]]:
    """Files in layers/ that the registry names, and those names."""
    found: dict[str, list[str]] = {}
    for name, entry in registry.LAYERS.items():
        found.setdefault(entry.module, []).append(name)
    return found


def read(path: Path) -> Architecture:
    """Raises ValueError for a file that is no TOML, or has other keys than `Architecture`."""
    try:
        return msgspec.convert(tomllib.loads(path.read_text()), Architecture)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise ValueError(f"{path.name}: {error}") from None


def load(folder: Path = FOLDER) -> dict[str, Architecture]:
    """By module, as in the registry. Raises ValueError for a module without a file, or the reverse."""
    wanted, found = list(modules()), {path.stem: path for path in sorted(folder.glob("*.toml"))}
    for name in wanted:
        if name not in found:
            raise ValueError(f"layers/{name}.py has no page: {folder.name}/{name}.toml is missing")
    for name in found:
        if name not in wanted:
            raise ValueError(f"{folder.name}/{name}.toml is about no module that the registry names")
    return {name: read(found[name]) for name in wanted}
