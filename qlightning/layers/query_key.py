"""Attention scores from one quantized matrix per head: the product of the query and key projections.

q_i . k_j = x_i (W_q' W_k) x_j' when neither projection has a bias. With M_h = W_q,h' W_k,h (features x features) per
head, scores are x_i . Q2(Q(M_h) x_j): one rounding of the product in the place of two of its factors, whose errors
would multiply (OFQ, Liu et al., ICML 2023, arXiv 2302.02210). The projections stay the parameters that are trained.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlightning.adapters.inside import Inside
from qlightning.layers.attention import AttentionRewrite, AttentionTwin, attend
from qlightning.layers.contraction import contract
from qlightning.layers.layer import Twin, plain_class
from qlightning.layers.linear import _LINEAR
from qlightning.numerics.autograd import keep_in_graph

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")

# What the forward of a vision transformer's attention refers to; whatever more another one does stands between the
# projections and their product (rotary embedding, norms of queries and keys, a cache) or beside it.
_KNOWN = {
    *(*_PROJECTIONS, "shape", "view", "transpose", "reshape", "contiguous", "head_dim", "scaling", "is_causal"),
    *("config", "_attn_implementation", "get_interface", "ALL_ATTENTION_FUNCTIONS", "eager_attention_forward"),
    *("training", "attention_dropout"),
}


class QueryKey(nn.Module):
    """x (..., tokens, features) -> x as the product sees it, and M x for all heads (..., tokens, heads * features).

    It has no parameters of its own: M is made of the attention module's projections as they are.

    Args:
        attention: The attention module that it is part of.
    """

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.__dict__["attention"] = attention  # no child: it is the other way round
        self.heads: int = attention.num_attention_heads  # type: ignore[assignment]

    def projections(self) -> tuple[Tensor, Tensor]:
        """W_q and W_k, (heads * head features, features) each."""
        attention = self.__dict__["attention"]
        return attention.q_proj.weight, attention.k_proj.weight

    @property
    def weight(self) -> Tensor:
        """M of every head, (heads * features, features)."""
        return _product(*self.projections(), self.heads)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, F.linear(x, self.weight)


def _product(query: Tensor, key: Tensor, heads: int) -> Tensor:
    with torch.autocast(query.device.type, enabled=False):
        return (query.unflatten(0, (heads, -1)).mT @ key.unflatten(0, (heads, -1))).flatten(0, 1)


class _Product(Inside):
    """M in the place of a weight: made of the projections in forward, and once more in backward."""

    def __init__(self, query: Tensor, key: Tensor, heads: int) -> None:
        self.query, self.key, self.heads = query, key, heads

    def tensors(self) -> tuple[Tensor, ...]:
        return self.query, self.key

    def effective(self, matrix: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        return _product(tensors[0], tensors[1], self.heads)

    def gradients(self, grad: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        query, key = (tensor.unflatten(0, (self.heads, -1)) for tensor in tensors)
        grad = grad.unflatten(0, (self.heads, -1))
        return (key @ grad.mT).flatten(0, 1), (query @ grad).flatten(0, 1)


class QueryKeyTwin(Twin):
    """`QueryKey` with a quantized product, input (on both sides of it) and output (M x)."""

    heads: int
    weight: Tensor
    projections: Callable[[], tuple[Tensor, Tensor]]

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        return isinstance(module, QueryKey)

    def weights(self) -> Mapping[str, Tensor]:
        return {"weight": self.weight}

    def features(self) -> int:
        return self.projections()[0].shape[1]

    def output_features(self) -> int:
        return self.heads * self.features()

    @staticmethod
    def multiply_adds(module: nn.Module, inputs: Any, output: Any) -> int:
        x, middle = output
        return middle.numel() * (x.shape[-1] + x.shape[-2])

    def on_converted(self) -> None:
        for name in ("q_proj", "k_proj"):
            if isinstance(getattr(self.__dict__["attention"], name), Twin):
                raise ValueError(
                    f"{name} would be quantized and never used, since its product is: leave the factors in float, "
                    "rules={'q_proj': None, 'k_proj': None}"
                )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        input, output = self.quantizer("input"), self.quantizer("output")
        x = x if input is None else input(x)
        if x.numel() == 0:
            return x, F.linear(x, self.weight)
        query, key = self.projections()
        inside = _Product(query, key, self.heads)
        middle = contract(_LINEAR, x, query.detach(), None, None, self.quantizer("weight"), inside=inside)
        return x, middle if output is None else output(middle)


class QueryKeyProduct(AttentionRewrite):
    """Gives an attention module of a vision transformer a child `query_key`, which rules then quantize by its name.

        Scheme(attention="uint4-lsq", transform=QueryKeyProduct())

    Biases of the query and key projections are left out (a change of the function), and come back with `restore`. In
    the coverage table the projections stand as float: what is quantized is their product, in the line of `query_key`.

    Raises:
        ValueError: The module does more with queries and keys than to multiply them.
    """

    def build(self, matrix: Tensor, features: int) -> None:
        pass

    def on_attached(self, layer: nn.Module) -> None:
        assert isinstance(layer, AttentionTwin)
        if reason := _unfit(layer):
            raise ValueError(
                f"{plain_class(layer).__name__} {reason}; the product of projections is for vision transformers such "
                "as ViT: leave QueryKeyProduct out of this layer's scheme"
            )
        layer.add_module("query_key", QueryKey(layer).train(layer.training))

    def on_detached(self, layer: nn.Module) -> None:
        layer._modules.pop("query_key", None)

    def run(self, layer: AttentionTwin, *args: Any, **kwargs: Any) -> Any:
        return _attention(layer, *args, **kwargs)


def _attention(
    layer: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """As transformers' ViTAttention, for hidden states (batch, tokens, features)."""
    x, middle = layer.query_key(hidden_states)
    query = x.unsqueeze(1).expand(-1, layer.query_key.heads, -1, -1)
    key = middle.unflatten(-1, (layer.query_key.heads, -1)).transpose(1, 2)
    value = layer.v_proj(hidden_states).unflatten(-1, (-1, layer.head_dim)).transpose(1, 2)
    dropout = layer.attention_dropout if layer.training else 0.0
    output, weights = attend(layer, query, key, value, attention_mask, dropout=dropout, scaling=layer.scaling, **kwargs)
    y = layer.o_proj(output.flatten(2))
    unused = [bias for bias in (layer.q_proj.bias, layer.k_proj.bias) if bias is not None]
    return keep_in_graph(y, *unused), weights


def _unfit(layer: AttentionTwin) -> str | None:
    if missing := [name for name in _PROJECTIONS if not isinstance(getattr(layer, name, None), nn.Linear)]:
        return f"has no linear {missing[0]}"
    q, k = (getattr(layer, name).weight for name in ("q_proj", "k_proj"))
    if q.shape != k.shape:
        return f"has {tuple(k.shape)} keys for {tuple(q.shape)} queries"
    if getattr(layer, "is_causal", True):
        return "is causal"
    more = set(inspect.unwrap(plain_class(layer).forward).__code__.co_names) - _KNOWN
    if more or not isinstance(getattr(layer, "num_attention_heads", None), int):
        return f"does more with queries and keys than to multiply them ({', '.join(sorted(more)) or 'unknown heads'})"
    return None
