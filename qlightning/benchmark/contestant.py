"""Who is measured: plain training, and our schemes on the same weights."""

from abc import ABC, abstractmethod
from typing import Any, final

from torch import nn

from qlightning.layers.backward import Backward
from qlightning.layers.convert import convert
from qlightning.layers.on_codes import OnCodes
from qlightning.layers.scheme import Scheme


class Contestant(ABC):
    """A way to train a model.

    Attributes:
        name: How it stands in tables.
    """

    name: str

    def absent(self) -> str | None:
        """Why it cannot be measured here, or None."""
        return None

    @abstractmethod
    def prepare(self, model: nn.Module) -> nn.Module:
        """The model as this contestant trains it; the argument may be changed."""


@final
class Plain(Contestant):
    """Training without quantization: what ratios are to."""

    name = "plain"

    def prepare(self, model: nn.Module) -> nn.Module:
        return model


@final
class Ours(Contestant):
    """A scheme of qlightning, on all layers that are quantized by default.

    Args:
        scheme: Spec of weights, behind a comma of inputs, and behind another the products that are of codes:
            "int4-g32", "int4-g32,int8-token", "int8-channel,int8-token,fprop+dgrad+wgrad".
    """

    def __init__(self, scheme: str) -> None:
        self.scheme = scheme
        self.name = f"qlightning {scheme}"
        self.weight, self.input, products = split(scheme)
        self.product = OnCodes(products) if products else None
        self.backward = _operands(self.weight.split("-")[0], products)

    def prepare(self, model: nn.Module) -> nn.Module:
        scheme = Scheme(self.weight, input=self.input, product=self.product, backward=self.backward)
        convert(model, {"*": scheme})
        return model


def _operands(kind: str, products: list[Any]) -> Backward | None:
    """What dgrad and wgrad multiply: operands of the weights' format with a scale per row of each."""
    token, channel = f"{kind}-token", f"{kind}-channel"
    dgrad: dict[str, Any] = {"grad_dgrad": token, "weight_dgrad": channel} if "dgrad" in products else {}
    wgrad: dict[str, Any] = {"grad_wgrad": channel, "input_wgrad": channel} if "wgrad" in products else {}
    return Backward(**dgrad, **wgrad) if dgrad or wgrad else None


def split(scheme: str) -> tuple[str, str | None, list[Any]]:
    """Specs of weights and of inputs, and products of codes, in a scheme as it is written in a command.

    Raises:
        ValueError: There are more parts.
    """
    weight, *rest = (part.strip() for part in scheme.split(","))
    if len(rest) > 2:
        raise ValueError(f"scheme {scheme!r}: weights, inputs and products, as in 'int8-channel,int8-token,fprop'")
    return weight, rest[0] if rest else None, rest[1].split("+") if len(rest) > 1 else []
