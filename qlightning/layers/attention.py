"""Quantized keys, values and attention probabilities in models of transformers.

transformers' attention modules leave the arithmetic to a function that they look up under the name their config gives.
A converted module sees its config through `_Routed` and finds `attend`, which quantizes and then hands on to the
function the config names. The config itself stays as it is: masks are made as before, other attention modules run as
before, and `model.set_attn_implementation` keeps its meaning.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlightning.layers.layer import Twin, plain_class
from qlightning.numerics.layer_part import LayerPart
from qlightning.numerics.scales import Grid
from qlightning.numerics.tensor_quantizer import TensorQuantizer

NAME = "qlightning"
"""Under which transformers finds `attend`."""

_INTERFACE, _EAGER = "ALL_ATTENTION_FUNCTIONS", "eager_attention_forward"


class _Routed:
    """The config of a model as a converted attention module reads it."""

    _attn_implementation = NAME

    def __init__(self, plain: Any) -> None:
        self.__dict__["plain"] = plain

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["plain"], name)


class AttentionRewrite(LayerPart, ABC):
    """A transform of an attention module: other arithmetic for the same attention, as far as it says so."""

    place, beside = "transform", "attention"

    @abstractmethod
    def run(self, layer: "AttentionTwin", *args: Any, **kwargs: Any) -> Any:
        """What the module's own forward does, with `attend` for its attention function."""


class AttentionTwin(Twin):
    """An attention module of transformers with quantized keys, values (after rotary embedding) and probabilities.

    Keys and values are (batch, heads, tokens, head features) and quantized as they come out of the cache, which keeps
    them in float: a token's are the same in training, prefill and decoding. Probabilities (batch, heads, tokens, keys)
    are quantized before dropout, by the model's own eager attention: that costs its memory.
    """

    placements = {"kv_cache": ("key", "value"), "attention": ("attention",)}
    places = ("transform",)
    eager: ClassVar[Callable[..., tuple[Tensor, Tensor]] | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        plain = next((base for base in cls.__bases__ if not issubclass(base, Twin)), None)
        if plain is not None and issubclass(
            plain, nn.Module
        ):  # the class of converted layers, made when one is converted or unpickled
            function = _eager_function(plain)
            cls.eager = None if function is None else staticmethod(function)
            _functions().register(NAME, attend)

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        return _looks_up(module) or ("Attention" in type(module).__name__ and not module._parameters)

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        if not _looks_up(module):
            return (
                "it computes attention by itself; kv_cache and attention act where a module of transformers looks its "
                f"function up ({_INTERFACE}.get_interface(self.config._attn_implementation, ...))"
            )
        if getattr(module, "reorder_and_upcast_attn", False):
            return "reorder_and_upcast_attn=True computes attention past the function it looks up"
        return None

    @property
    def config(self) -> Any:
        return _Routed(self.__dict__["config"])

    @config.setter
    def config(self, config: Any) -> None:
        self.__dict__["config"] = config

    @property
    def implementation(self) -> str:
        """Name of the attention function that the model is configured with."""
        name: str = self.__dict__["config"]._attn_implementation
        return name

    def weights(self) -> Mapping[str, Tensor]:
        return {}

    def on_converted(self) -> None:
        for prefix, quantizer in self.quantizers():
            if getattr(self, "is_causal", True):
                _check_tokens_apart("attention" if prefix == "attention" else "kv_cache", quantizer)
            if prefix != "attention" and isinstance(size := getattr(self, "head_dim", None), int):
                quantizer.granularity.scale_shape((-1, size))
        if self.quantizer("attention") is not None:
            _check_probabilities(self)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        rewrite = self._modules.get("transform")
        if isinstance(rewrite, AttentionRewrite):
            return rewrite.run(self, *args, **kwargs)
        return plain_class(self).forward(self, *args, **kwargs)


def attend(
    module: AttentionTwin, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention function of converted modules, with the signature that transformers gives all of them."""
    keys, values, probabilities = (module.quantizer(name) for name in ("key", "value", "attention"))
    key = key if keys is None else keys(key)
    value = value if values is None else values(value)
    if probabilities is not None and (probabilities.enabled or probabilities.observing):
        mask = _additive(attention_mask, module, query, key, kwargs)
        return _quantized_probabilities(module, probabilities, query, key, value, mask, **kwargs)
    function = _functions().get_interface(module.implementation, module.eager)
    output, weights = function(module, query, key, value, attention_mask, **kwargs)
    return output if probabilities is None else probabilities.bypass(output), weights


def _quantized_probabilities(
    module: AttentionTwin,
    quantizer: TensorQuantizer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """The model's own eager attention gives the probabilities; without features, values cost it nothing."""
    assert module.eager is not None
    _, p = module.eager(module, query, key, value[..., :0], mask, dropout=0.0, **kwargs)
    p = F.dropout(quantizer(p), dropout, module.training)
    groups = p.shape[1] // value.shape[1]
    if groups > 1:
        value = value.repeat_interleave(groups, dim=1)
    return (p @ value).transpose(1, 2).contiguous(), p


def _additive(
    mask: Tensor | None, module: AttentionTwin, query: Tensor, key: Tensor, kwargs: Mapping[str, Any]
) -> Tensor | None:
    """The mask that eager attention adds, from what the configured implementation is given."""
    if module.implementation != "sdpa":
        return mask
    queries, keys = query.shape[2], key.shape[2]
    causal = kwargs.get("is_causal")
    if mask is None and queries > 1 and (getattr(module, "is_causal", True) if causal is None else causal):
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)


def _check_tokens_apart(placement: str, quantizer: TensorQuantizer) -> None:
    if quantizer.scale.static:
        return
    x = torch.ones(2, getattr(quantizer.granularity, "size", 64)) * torch.tensor([[1.0], [100.0]])
    both, alone = Grid(*quantizer.grid(x)).step, Grid(*quantizer.grid(x[:1])).step
    if both.shape[0] != 2 or not torch.equal(both[:1], alone):
        raise ValueError(
            f"{placement}={quantizer!r} measures one scale over all tokens, so that a token would depend on later ones "
            f"and decoding would differ from training: write {placement}='int8-token', or a scale that is learned or "
            f"observed, {placement}='int8-tensor-lsq'"
        )


def _check_probabilities(module: AttentionTwin) -> None:
    if module.eager is None:
        raise ValueError(f"{plain_class(module).__name__} has no eager attention that gives its probabilities")
    if "logsumexp" in inspect.unwrap(module.eager).__code__.co_names:
        raise ValueError(f"the attention of {plain_class(module).__name__} is more than probabilities times values")
    if module.implementation not in ("sdpa", "eager"):
        raise ValueError(
            f"{module.implementation!r} attention has no probabilities to quantize and masks of its own; call "
            "model.set_attn_implementation('sdpa') first"
        )


def _plain_forward(cls: type[nn.Module]) -> Any:
    return inspect.unwrap(cls.forward)


def _looks_up(module: nn.Module) -> bool:
    code = getattr(_plain_forward(type(module)), "__code__", None)
    return code is not None and _INTERFACE in code.co_names and "config" in module.__dict__


def _eager_function(plain: type[nn.Module]) -> Callable[..., tuple[Tensor, Tensor]] | None:
    forward = _plain_forward(plain)
    names = [name for name in forward.__code__.co_names if name.endswith(_EAGER)]
    return forward.__globals__[names[0]] if names else None


def _functions() -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS
