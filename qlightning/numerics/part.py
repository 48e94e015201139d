"""What every part of a quantizer shares: it is described by the arguments that built it.

A part keeps each constructor argument under the argument's own name. From that one convention follow its `repr` (the
call that builds it again), its equality and its plain-data form for checkpoints and YAML.
"""

import functools
import inspect
from collections.abc import Mapping
from typing import Any


class Part:
    """A building block with value semantics: two parts are equal when their type and arguments are."""

    def arguments(self) -> dict[str, Any]:
        """The constructor arguments that differ from their defaults, by name."""
        parameters = _parameters(type(self))  # type: ignore[arg-type]
        return {
            name: getattr(self, name)
            for name, parameter in parameters.items()
            if parameter.default is inspect.Parameter.empty or getattr(self, name) != parameter.default
        }

    def __repr__(self) -> str:
        parameters = _parameters(type(self))  # type: ignore[arg-type]
        shown = []
        for name, value in self.arguments().items():
            keyword = name not in parameters or parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
            shown.append(f"{name}={value!r}" if keyword else repr(value))
        return f"{type(self).__name__}({', '.join(shown)})"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.arguments() == other.arguments()  # type: ignore[attr-defined]

    def __hash__(self) -> int:
        return hash((type(self), repr(self)))


@functools.cache
def _parameters(part: type) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(part).parameters
