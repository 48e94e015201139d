"""Taps: what named submodules give while something runs.

A pattern names submodules by a glob on the dotted name, or on any tail of it ("layers.0.mlp", "layers.*"): "*" stands
for any text without a dot, "**" for any text. "type:Linear" names all of a class (converted layers go by the class they
had before), "forward" the module itself. A suffix ":key" picks from an output that is no tensor: "model:logits",
"encoder:0".
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qlightning.layers.coverage import kind_of, public_name

ITSELF = "forward"
"""The pattern of the module itself; no submodule can have that name."""

_USUAL = ("logits", "last_hidden_state", "sample")


class Site(NamedTuple):
    """A submodule whose output is wanted.

    Attributes:
        name: Dotted name, "forward" for the module itself.
        module: The submodule.
        key: What of its output, or None for the tensor that it is, or that it holds under a usual name.
        stars: What the pattern's stars stood for.
    """

    name: str
    module: nn.Module
    key: str | None
    stars: tuple[str, ...]


def sites(root: nn.Module, pattern: str) -> list[Site]:
    """The submodules a pattern names, in the module's order.

    Raises:
        ValueError: There are none; the message says which names are near.
    """
    glob, key = _split(pattern)
    if glob == ITSELF:
        return [Site(ITSELF, root, key, ())]
    named: dict[str, nn.Module] = {}
    for name, module in root.named_modules():
        if name:
            named.setdefault(public_name(name), module)  # the outer one of a layer and what is wrapped around it
    if glob.startswith("type:"):
        wanted = glob.removeprefix("type:")
        found = [Site(name, m, key, ()) for name, m in named.items() if fnmatchcase(kind_of(m), wanted)]
        known: Iterable[str] = {f"type:{kind_of(module)}" for module in named.values()}
    else:
        matches = {name: _glob(glob).fullmatch(name) for name in named}
        found = [Site(name, named[name], key, m.groups()) for name, m in matches.items() if m]
        known = named
    if not found:
        near = difflib.get_close_matches(glob, sorted(known), n=3, cutoff=0.0)
        raise ValueError(
            f"{pattern!r} names no submodule of {type(root).__name__}; there are for example {', '.join(near)}"
        )
    return found


def partner(root: nn.Module, pattern: str, stars: tuple[str, ...]) -> Site:
    """The one submodule that a pattern names when its stars stand for `stars`.

    Raises:
        ValueError: Another number of stars, no such submodule, or several.
    """
    pieces = re.split(r"\*+", pattern)
    if len(pieces) > 1 and len(pieces) != len(stars) + 1:
        raise ValueError(f"{pattern!r} has {len(pieces) - 1} stars, the pattern it belongs to {len(stars)}")
    name = "".join(piece + star for piece, star in zip(pieces, (*stars, ""), strict=False))
    name = name if len(pieces) > 1 else pattern
    found = sites(root, name)
    exact = [site for site in found if site.name == _split(name)[0]] or found
    if len(exact) > 1:
        raise ValueError(f"{name!r} names several submodules, {', '.join(site.name for site in exact[:3])}: write one")
    return exact[0]


def _split(pattern: str) -> tuple[str, str | None]:
    kind, colon, rest = pattern.partition(":") if pattern.startswith("type:") else ("", "", pattern)
    glob, _, key = rest.partition(":")
    return kind + colon + glob, key or None


def _glob(pattern: str) -> re.Pattern[str]:
    parts = {"**": "(.*)", "*": "([^.]*)"}
    return re.compile(r"(?:.*\.)?" + "".join(parts.get(p, re.escape(p)) for p in re.split(r"(\*\*|\*)", pattern)))


class Taps:
    """Keeps the outputs of submodules while it is entered; the hooks that it needs exist only then.

    So recomputation in backward, validation and copies of the module see none of it.

    Args:
        tapped: What is wanted.
    """

    def __init__(self, tapped: Iterable[Site]) -> None:
        self._sites = {(site.name, site.key): site for site in tapped}
        self._kept: dict[tuple[str, str | None], list[tuple[Tensor, int]]] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> "Taps":
        self._kept = {place: [] for place in self._sites}
        for place, site in self._sites.items():
            self._handles.append(site.module.register_forward_hook(self._hook(place)))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, place: tuple[str, str | None]) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            tensor = _pick(output, *place)
            self._kept[place].append((tensor, tensor._version))

        return keep

    def outputs(self, site: Site, *, trained: bool = False) -> list[Tensor]:
        """What the submodule gave, call by call.

        Args:
            site: One of those that are tapped.
            trained: Whether gradients must flow back into what it gave.

        Raises:
            ValueError: It was not called, its output was overwritten, or no gradient can flow where it must.
        """
        kept = self._kept[site.name, site.key]
        if not kept:
            raise ValueError(f"{site.name} was not called: name a submodule whose output the training step uses")
        for tensor, version in kept:
            if tensor._version != version:
                raise ValueError(
                    f"what {site.name} gave was overwritten by an in-place operation after it, such as "
                    "ReLU(inplace=True): name the submodule that does it instead, or make it inplace=False"
                )
            if trained and torch.is_grad_enabled() and not tensor.requires_grad:
                raise ValueError(
                    f"no gradient flows back from the output of {site.name}: all before it is frozen, or it lies in a "
                    "segment of reentrant gradient checkpointing; write for example "
                    "model.activation_checkpointing_enable({'use_reentrant': False})"
                )
        return [tensor for tensor, _ in kept]


def _pick(output: Any, name: str, key: str | None) -> Tensor:
    """The tensor in what a module returned."""
    if isinstance(output, Tensor) and key is None and output.is_floating_point():
        return output
    entries = _entries(output)
    place = key or next((entry for entry in (*_USUAL, "0") if entry in entries), "")
    picked = entries.get(place)
    if not isinstance(picked, Tensor) or not picked.is_floating_point():
        keys = [k for k, value in entries.items() if isinstance(value, Tensor)]
        example = f"write for example {f'{name}:{keys[0]}'!r}" if keys else "it holds no tensors by name"
        raise ValueError(f"{name} gave a {type(output).__name__}, no tensor of numbers under {key!r}; {example}")
    return picked


def _entries(output: Any) -> dict[str, Any]:
    if isinstance(output, Mapping):
        return {str(key): value for key, value in output.items()}
    if isinstance(output, tuple | list):
        named = dict(zip(getattr(output, "_fields", ()), output, strict=False))
        return {**{str(index): value for index, value in enumerate(output)}, **named}
    return dict(getattr(output, "__dict__", {}))
