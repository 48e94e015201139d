"""Quantized twin of fused experts: all experts' matrices in one 3-D parameter, as transformers' mixtures keep them."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from qlightning.layers.layer import Twin, plain_class
from qlightning.layers.stand_in import Layout, stand_ins, with_stand_ins

# E experts, O outputs, I inputs. The matrix has the output channels of all experts, one expert after another, as rows.
_EOI = Layout(lambda w_EOI: w_EOI.flatten(0, 1), lambda matrix, w_EOI: matrix.view(w_EOI.shape))
_EIO = Layout(
    lambda w_EIO: w_EIO.transpose(1, 2).flatten(0, 1),
    lambda matrix, w_EIO: matrix.view(w_EIO.transpose(1, 2).shape).transpose(1, 2),
)
_NAMES = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")


class ExpertsTwin(Twin):
    """Fused experts (Mixtral, Qwen-MoE, DeepSeek, GPT-OSS, Llama 4 ...): hidden states (tokens, features) and routing.

    The experts' own forward, by loop or grouped matmul, runs on quantized weights. For backward the weights are
    quantized once more: nothing is kept beyond what plain experts keep. `input` quantizes the hidden states that enter
    the experts; what flows between an expert's two matrices stays in float.
    """

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        return "down_proj" in _matrices(module) and len(_matrices(module)) > 1

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        if _layout(module) is None:
            return f"whether {type(module).__name__} keeps (experts, out, in) or (experts, in, out) cannot be told"
        return None

    def weights(self) -> Mapping[str, Tensor]:
        layout = _layout(self)
        assert layout is not None
        return _Views(_matrices(self), layout)

    def features(self) -> int:
        first = next(iter(_matrices(self).values()))
        return first.shape[1 if _layout(self) is _EIO else 2]

    def output_features(self) -> int:
        return _matrices(self)["down_proj"].shape[2 if _layout(self) is _EIO else 1]

    @staticmethod
    def multiply_adds(module: nn.Module, inputs: Any, output: Any) -> int:
        routed = inputs[1].numel() if len(inputs) > 1 else output.numel() // output.shape[-1]
        return routed * sum(weight[0].numel() for weight in _matrices(module).values())

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        input, output = self.quantizer("input"), self.quantizer("output")
        places = stand_ins(self, _NAMES, _layout(self) or _EOI)  # without a layout a weight is gone, which it reports
        x = hidden_states if input is None else input(hidden_states)
        y: Tensor = with_stand_ins(places, lambda: plain_class(self).forward(self, x, *args, **kwargs))
        return y if output is None else output(y)


class _Views(Mapping[str, Tensor]):
    """Matrices by name, made when asked for: those of the transposed layout are copies."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], layout: Layout) -> None:
        self.parameters, self.layout = parameters, layout

    def __getitem__(self, name: str) -> Tensor:
        return self.layout.matrix(self.parameters[name])

    def __contains__(self, name: object) -> bool:
        return name in self.parameters

    def __iter__(self) -> Iterator[str]:
        return iter(self.parameters)

    def __len__(self) -> int:
        return len(self.parameters)


def _matrices(module: nn.Module) -> dict[str, nn.Parameter]:
    own = module._parameters
    return {name: p for name in _NAMES if (p := own.get(name)) is not None and p.dim() == 3}


def _layout(module: nn.Module) -> Layout | None:
    """As the class declares it, or as the shapes of two projections that meet tell."""
    if (transposed := getattr(module, "is_transposed", None)) is not None:
        return _EIO if transposed else _EOI
    matrices = _matrices(module)
    if "gate_up_proj" not in matrices:
        return None
    (_, first, second), (_, third, fourth) = matrices["gate_up_proj"].shape, matrices["down_proj"].shape
    if (first, second) == (2 * fourth, third):
        return _EOI
    return _EIO if (first, second) == (fourth, 2 * third) else None
