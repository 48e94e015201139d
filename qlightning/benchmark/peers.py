"""Other tools on the same weights, where they are installed: torchao, Brevitas and ModelOpt.

Each is asked for the scheme as its own documentation does; a scheme it has no words for is refused, and the table says
so.
"""

from abc import abstractmethod
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple, final

import torch
from torch import nn

from qlightning.benchmark.contestant import Contestant, split
from qlightning.numerics.formats import Int
from qlightning.numerics.granularity import PerChannel, PerGroup, PerToken
from qlightning.numerics.quantizer import Quantizer
from qlightning.numerics.spec import parse


class Asked(NamedTuple):
    """A scheme in the words that all three tools have.

    Attributes:
        bits: Of symmetric integer weights.
        group: Weights that share a scale along the fan-in; None: a whole output channel.
        input_bits: Of symmetric integer inputs with a scale per token, or None.
    """

    bits: int
    group: int | None
    input_bits: int | None


def asked(scheme: str) -> Asked | None:
    """The scheme in the peers' words; None where it has none in them."""
    spec, input, products = split(scheme)
    weight, inputs = parse(spec), None if input is None else parse(input)
    if products or not _plain_integer(weight) or not isinstance(weight.granularity, PerGroup | PerChannel):
        return None
    if inputs is not None and not (_plain_integer(inputs) and isinstance(inputs.granularity, PerToken)):
        return None
    group = weight.granularity.size if isinstance(weight.granularity, PerGroup) else None
    return Asked(_bits(weight), group, None if inputs is None else _bits(inputs))


def _plain_integer(quantizer: Quantizer) -> bool:
    return isinstance(quantizer.format, Int) and quantizer.format.symmetric


def _bits(quantizer: Quantizer) -> int:
    assert isinstance(quantizer.format, Int)
    return quantizer.format.bits


class Peer(Contestant):
    """Another tool with a scheme.

    Args:
        scheme: As for our own: "int4-g32", "int4-g32,int8-token".
    """

    tool: str
    package: str

    @final
    def __init__(self, scheme: str) -> None:
        self.name = f"{self.tool} {scheme}"
        self.asked = asked(scheme)

    @final
    def absent(self) -> str | None:
        if find_spec(self.package) is None:
            return f"{self.tool} is not installed"
        if self.asked is None:
            return f"{self.tool} has no such scheme"
        return None

    @final
    def prepare(self, model: nn.Module) -> nn.Module:
        assert self.asked is not None
        heads = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in ("lm_head", "classifier")]
        return self.insert(model, self.asked, lambda name: name not in heads)

    @abstractmethod
    def insert(self, model: nn.Module, asked: Asked, wanted: Callable[[str], bool]) -> nn.Module:
        """The model with this tool's fake quantizers around the linear layers that are wanted by name."""


@final
class TorchAO(Peer):
    """torchao's QAT API. Its inputs have a zero point: it has no symmetric ones with a scale per token."""

    tool, package = "torchao", "torchao"

    def insert(self, model: nn.Module, asked: Asked, wanted: Callable[[str], bool]) -> nn.Module:
        from torchao.quantization import quantize_
        from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

        kinds: dict[int, torch.dtype] = {4: torch.int4, 8: torch.int8}  # type: ignore[attr-defined]
        shared: Any = {"granularity": "per_channel"} if asked.group is None else {"group_size": asked.group}
        weight = IntxFakeQuantizeConfig(kinds[asked.bits], is_symmetric=True, **shared)
        input = asked.input_bits and IntxFakeQuantizeConfig(kinds[asked.input_bits], "per_token", is_symmetric=False)
        config = QATConfig(activation_config=input or None, weight_config=weight, step="prepare")
        quantize_(model, config, lambda module, name: isinstance(module, nn.Linear) and wanted(name))
        return model


@final
class Brevitas(Peer):
    """Brevitas' quantized layers in place of the model's, with the quantizers of its language model examples."""

    tool, package = "brevitas", "brevitas"

    def insert(self, model: nn.Module, asked: Asked, wanted: Callable[[str], bool]) -> nn.Module:
        from brevitas.nn import QuantLinear
        from brevitas.quant.scaled_int import Int8WeightPerChannelFloat
        from brevitas_examples.common.generative.quantizers import Int8DynamicActPerRowFloat
        from brevitas_examples.common.generative.quantizers import IntWeightSymmetricGroupQuant as Grouped

        weight = Int8WeightPerChannelFloat if asked.group is None else Grouped.let(group_size=asked.group)
        weight = weight.let(bit_width=asked.bits)
        input = asked.input_bits and Int8DynamicActPerRowFloat.let(bit_width=asked.input_bits)
        for name, layer in list(model.named_modules()):
            if isinstance(layer, nn.Linear) and wanted(name):
                bias = layer.bias is not None
                other = QuantLinear(
                    layer.in_features, layer.out_features, bias=bias, weight_quant=weight, input_quant=input or None
                )
                other.weight, other.bias = layer.weight, layer.bias
                parent, _, last = name.rpartition(".")
                setattr(model.get_submodule(parent), last, other.to(layer.weight.device))
        return model.train()


@final
class ModelOpt(Peer):
    """NVIDIA ModelOpt's quantize with dynamic maxima, which is what its QAT trains through."""

    tool, package = "modelopt", "modelopt"

    def insert(self, model: nn.Module, asked: Asked, wanted: Callable[[str], bool]) -> nn.Module:
        import modelopt.torch.quantization as mtq

        shared: Any = {"axis": 0} if asked.group is None else {"block_sizes": {-1: asked.group}}
        config = [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": asked.bits, **shared}},
        ]
        if asked.input_bits:
            per_token = {"num_bits": asked.input_bits, "type": "dynamic", "block_sizes": {-1: None}}
            config.append({"quantizer_name": "*input_quantizer", "cfg": per_token})
        unwanted = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and not wanted(name)]
        config += [{"quantizer_name": f"{name}*", "enable": False} for name in unwanted]
        return mtq.quantize(model, {"quant_cfg": config, "algorithm": "max"}, forward_loop=None)  # type: ignore[no-any-return]


PEERS: dict[str, type[Peer]] = {kind.tool: kind for kind in (TorchAO, Brevitas, ModelOpt)}
