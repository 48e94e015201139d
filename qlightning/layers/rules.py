"""Rules: which layer gets which scheme."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from qlightning.layers.scheme import Scheme, Spec, as_scheme

RuleValue = Scheme | Spec | Mapping[str, Any] | None
EVERYTHING = "*"

FLOAT_BY_DEFAULT = ("lm_head",)
"""Output heads stay in float unless a rule of the user's names them: serving runtimes expect it so."""


class Rules:
    """Ordered patterns with a scheme (or None for float) each; the last that matches a layer decides.

    A pattern is a glob on the layer's dotted name, or on any tail of it ("mlp.down_proj", "layers.0.*", "lm_head"), or
    "type:" and the name of a layer's class ("type:Conv2d"), or "first:" or "last:" and a number of blocks ("last:4") or
    a share of them ("last:0.15"). Blocks are what is numbered in a model, "model.layers.0" or "layer1.0", in its order.
    "*" is the rule for everything else.

    Args:
        rules: By pattern, in order: a Scheme, a spec for the weight, a mapping of placements, or None.
    """

    def __init__(self, rules: "Mapping[str, RuleValue] | Scheme | Spec | Rules") -> None:
        if isinstance(rules, Rules):
            rules = rules.given
        self.given: dict[str, RuleValue] = dict(rules) if isinstance(rules, Mapping) else {EVERYTHING: rules}
        if not self.given:
            raise ValueError("no rules: write for example convert(module, 'int4-g128')")
        if "weight" in self.given:
            raise ValueError(f"rules map layers to schemes; for all layers alike write {{'*': {self.given!r}}}")
        ordered: dict[str, RuleValue] = {EVERYTHING: self.given.get(EVERYTHING)}
        ordered |= {pattern: None for pattern in FLOAT_BY_DEFAULT if pattern not in self.given}
        ordered |= {pattern: value for pattern, value in self.given.items() if pattern != EVERYTHING}
        self.schemes = {pattern: _scheme(pattern, value) for pattern, value in ordered.items()}
        self.decided: dict[str, int] = dict.fromkeys(self.schemes, 0)
        self._blocks: dict[str, tuple[str, ...]] = {}
        for pattern in self.positional:
            _blocks_of(pattern, ["block"])

    @property
    def positional(self) -> list[str]:
        """The patterns that name blocks by their place in the model."""
        return [pattern for pattern in self.schemes if pattern.startswith(_POSITIONS)]

    def know(self, names: Iterable[str]) -> "Rules":
        """Learn the names of all layers of a model, in its order, which "first:" and "last:" ask for.

        Raises:
            ValueError: They are asked for, and no name has a number.
        """
        blocks = list(dict.fromkeys(match[0] for name in names if (match := _BLOCK.match(name))))
        for pattern in self.positional:
            if not blocks:
                raise ValueError(f"rule {pattern!r}: no layer of the model is in a numbered block; name layers instead")
            self._blocks[pattern] = _blocks_of(pattern, blocks)
        return self

    def decide(self, name: str, kind: str) -> tuple[str, Scheme | None]:
        """The deciding pattern and its scheme for a layer of that dotted name and class name."""
        pattern = self._deciding(name, kind)
        self.decided[pattern] += 1
        return pattern, self.schemes[pattern]

    def leaves(self, name: str, kind: str) -> str | None:
        """The pattern by which the user chose float for a layer that cannot be converted anyway, or None."""
        pattern = self._deciding(name, kind)
        if self.by_default(pattern) or self.schemes[pattern] is not None:
            return None
        self.decided[pattern] += 1
        return pattern

    def _deciding(self, name: str, kind: str) -> str:
        return [pattern for pattern in self.schemes if self._matches(pattern, name, kind)][-1]

    def _matches(self, pattern: str, name: str, kind: str) -> bool:
        if pattern.startswith("type:"):
            return fnmatchcase(kind, pattern.removeprefix("type:"))
        if pattern.startswith(_POSITIONS):
            return f"{name}.".startswith(self._blocks[pattern])
        return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")

    def by_default(self, pattern: str) -> bool:
        """Whether the pattern is not the user's own choice for particular layers."""
        return pattern == EVERYTHING or pattern not in self.given

    def check_used(self, names: Mapping[str, str], reasons: Mapping[str, str]) -> None:
        """Raise ValueError for a rule of the user's that decided nothing.

        Args:
            names: Class names by layer name.
            reasons: Why layers cannot be converted, by the names of those that cannot.
        """
        for pattern in self.given:
            if pattern == EVERYTHING or self.decided[pattern]:
                continue
            matched = [name for name, kind in names.items() if self._matches(pattern, name, kind)]
            if matched and all(name in reasons for name in matched):
                shown = "; ".join(f"{name}: {reasons[name]}" for name in matched[:3])
                raise ValueError(
                    f"rule {pattern!r} matches only layers that cannot be converted ({shown}); leave it out, or write "
                    f"{{{pattern!r}: None}} to say that they may stay in float"
                )
            if matched:
                raise ValueError(
                    f"rule {pattern!r} decides nothing: later rules decide all it matches ({', '.join(matched[:3])}); "
                    "put it after the more general ones"
                )
            if pattern.startswith("type:"):
                known = sorted({f"type:{kind}" for kind in names.values()})
            else:
                known = sorted(names)
            near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.0)
            raise ValueError(f"rule {pattern!r} matches no layer; layers are named for example {', '.join(near)}")


def _scheme(pattern: str, value: RuleValue) -> Scheme | None:
    try:
        return as_scheme(value)
    except ValueError as error:
        raise ValueError(str(error) if pattern == EVERYTHING else f"rule {pattern!r}: {error}") from None


_POSITIONS = ("first:", "last:")
_BLOCK = re.compile(r"(?:[^.]*[^.\d][^.]*\.)*\d+(?=\.|$)")
"""A dotted name up to its first number."""


def _blocks_of(pattern: str, blocks: Sequence[str]) -> tuple[str, ...]:
    """The blocks that a pattern such as "last:0.15" names, with a point behind each."""
    where, _, given = pattern.partition(":")
    try:
        count = max(1, round(float(given) * len(blocks))) if "." in given else int(given)
    except ValueError:
        count = 0
    if count < 1 or ("." in given and not 0 < float(given) <= 1):
        raise ValueError(f"rule {pattern!r}: write a number of blocks, '{where}:4', or a share of them, '{where}:0.15'")
    return tuple(f"{block}." for block in (blocks[:count] if where == "first" else blocks[-count:]))
