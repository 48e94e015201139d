"""Methods: a paper as a small class whose arguments are the paper's hyperparameters.

    Trainer(callbacks=L4Q(bits=3).callbacks())
    Trainer(callbacks=compose(AWQ(bits=None), LSQ(bits=4), CooldownFusion(start=0.8)))

A method says two things: the arguments of QATCallback that the paper determines, and the callbacks it adds. Methods
compose as long as no two of them determine the same argument differently.
"""

import inspect
from abc import ABC
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from lightning.pytorch import Callback

from qlightning.callbacks.qat import QATCallback
from qlightning.numerics.part import Part


class Method(Part, ABC):
    """A published method.

    The docstring of a method opens with what it is in one line; a line "Paper: ..." names title, authors, venue and
    arXiv number; then come the deviations from the paper. Constructor arguments are kept under their own names.

    Attributes:
        domain: What it is for; the contract test fits it on a tiny model of that domain.
        deploys: Whether the trained model is the deployed one, bit for bit.
        backward: Whether training computes gradients.
    """

    domain: ClassVar[Literal["text", "images", "denoising"]] = "text"
    deploys: ClassVar[bool] = True
    backward: ClassVar[bool] = True

    def quantization(self) -> dict[str, Any]:
        """The arguments of QATCallback that the paper determines."""
        return {}

    def extras(self) -> list[Callback]:
        """The callbacks that go beside QATCallback."""
        return []

    def check(self, others: Sequence["Method"]) -> None:
        """Raise ValueError, saying why, if it makes no sense together with one of `others`."""

    def callbacks(self) -> list[Callback]:
        """All callbacks of the method, for `Trainer(callbacks=...)`."""
        return compose(self)


class Quantization(Method):
    """Arguments of QATCallback that no paper determines, to be composed with a method.

        compose(LSQ(bits=4), Quantization(start=0.8, rules={"lm_head": "int8"}))

    Args:
        arguments: By name, as QATCallback takes them.
    """

    def __init__(self, **arguments: Any) -> None:
        self.given = arguments

    def arguments(self) -> dict[str, Any]:
        return dict(self.given)

    def quantization(self) -> dict[str, Any]:
        return dict(self.given)


def compose(*methods: Method) -> list[Callback]:
    """The callbacks of several methods together: one QATCallback with what all of them determine, then their own.

    Raises:
        ValueError: Two of them determine the same thing differently, or one makes no sense beside another.
    """
    for method in methods:
        method.check([other for other in methods if other is not method])
    quantization: dict[str, Any] = {}
    decided: dict[str, Method] = {}
    defaults = {name: p.default for name, p in inspect.signature(QATCallback).parameters.items()}
    for method in methods:
        for name, value in method.quantization().items():
            if name in defaults and value == defaults[name]:
                continue  # not determined, merely said
            if name == "rules" and "rules" in quantization:
                value = _merged_rules(quantization["rules"], value, decided["rules"], method)
            elif name in quantization and quantization[name] != value:
                _refuse(f"{name}={quantization[name]!r}", f"{name}={value!r}", decided[name], method)
            quantization[name] = value
            decided.setdefault(name, method)
    if "rules" in quantization and "*" in quantization["rules"] and "weight" in quantization:
        _refuse("a rule for every layer", "a weight spec", decided["rules"], decided["weight"])
    extras = [callback for method in methods for callback in method.extras()]
    return [QATCallback(**quantization), *extras] if quantization else extras


def _merged_rules(one: dict[str, Any], other: dict[str, Any], first: Method, second: Method) -> dict[str, Any]:
    for pattern in one.keys() & other.keys():
        if one[pattern] != other[pattern]:
            _refuse(f"{pattern!r}: {one[pattern]!r}", f"{pattern!r}: {other[pattern]!r}", first, second)
    return {**one, **other}


def _refuse(one: str, other: str, first: Method, second: Method) -> None:
    raise ValueError(
        f"{type(first).__name__} determines {one} and {type(second).__name__} {other}: one run has one of them; leave "
        f"it out of {first!r} or of {second!r}, or use one method alone"
    )
