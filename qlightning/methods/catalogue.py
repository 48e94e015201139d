"""What is in the catalogue, read from the folder: no list is edited to add a method."""

import ast
import functools
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from qlightning.methods.method import Method

_FOLDER = Path(__file__).parent


class Entry(NamedTuple):
    """A method as its source describes it.

    Attributes:
        name: The class.
        module: The file's name without ".py".
        summary: First line of the docstring.
        paper: What the docstring's "Paper:" says.
        docstring: All of it.
    """

    name: str
    module: str
    summary: str
    paper: str
    docstring: str


@functools.cache  # jsonargparse asks `find` for every name it meets
def catalogue() -> tuple[Entry, ...]:
    """Every method, by name. Reads the sources and imports none of them."""
    found = []
    for path in sorted(_FOLDER.glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            doc = ast.get_docstring(node) if isinstance(node, ast.ClassDef) else None
            if isinstance(node, ast.ClassDef) and doc and "\nPaper: " in doc:
                paper = doc.split("\nPaper: ", 1)[1].split("\n\n", 1)[0]
                found.append(Entry(node.name, path.stem, doc.splitlines()[0], " ".join(paper.split()), doc))
    return tuple(sorted(found, key=lambda entry: entry.name.lower()))


def find(name: str) -> "type[Method]":
    """The method of that class name.

    Raises:
        AttributeError: There is none.
    """
    for entry in catalogue():
        if entry.name == name:
            found: type[Method] = getattr(import_module(f"qlightning.methods.{entry.module}"), name)
            return found
    raise AttributeError(f"no method {name!r}; there are {', '.join(entry.name for entry in catalogue())}")
