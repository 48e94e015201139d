"""The product of the query and key projections, against the attention that it stands in for."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlightning import Scheme, convert, restore
from qlightning.layers.query_key import QueryKeyProduct
from qlightning.layers.swap import convert_like
from qlightning.numerics import AbsMean, PerChannel, Quantizer, parse
from qlightning.numerics.bins import Bins

transformers = pytest.importorskip("transformers")


def vit(attention: str = "sdpa", *, bias: bool = False, layers: int = 1) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32,
        num_attention_heads=2,
        intermediate_size=32,
        num_hidden_layers=layers,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=3,
        qkv_bias=bias,
        attn_implementation=attention,
    )
    return transformers.ViTForImageClassification(config)


def statsq(bits: int) -> Quantizer:
    return Quantizer(Bins(2**bits), PerChannel(), scale=AbsMean(multiplier=2.0))


def rules(weight: Any, *, input: Any = None, output: Any = None, attention: Any = "uint8") -> dict[str, Any]:
    return {
        "attention": Scheme(attention=attention, transform=QueryKeyProduct()),
        "query_key": Scheme(weight, input=input, output=output),
        **{"q_proj": None, "k_proj": None},
    }


def attention_of(model: nn.Module) -> Any:
    return next(m for name, m in model.named_modules() if name.endswith("0.attention"))


def pixels() -> Tensor:
    return torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def off(model: nn.Module) -> None:
    attention_of(model).attention_quantizer.enabled = False


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_without_quantizers_it_is_the_attention_without_biases(implementation: str) -> None:
    model, x = vit(implementation), pixels()
    expected = model(x).logits
    convert(model, rules("int8"), min_coverage=0)
    attention_of(model).query_key.weight_quantizer.enabled = False
    off(model)
    assert torch.allclose(model(x).logits, expected, atol=1e-5)


def test_sixteen_bits_give_the_scores_of_the_two_projections() -> None:
    """With absmax; StatsQ saturates at twice the mean magnitude, however many bits it has."""
    model, x = vit(), torch.randn(2, 5, 32)
    convert(model, rules("int16"), min_coverage=0)
    attention = attention_of(model)
    seen, middle = attention.query_key(x)
    q, k = (proj(x).unflatten(-1, (2, 16)).transpose(1, 2) for proj in (attention.q_proj, attention.k_proj))
    scores = seen.unsqueeze(1) @ middle.unflatten(-1, (2, 32)).permute(0, 2, 3, 1)
    expected = q @ k.mT
    assert torch.allclose(scores, expected, atol=1e-3 * float(expected.detach().abs().max()))
    assert not torch.equal(scores, expected)


def test_biases_are_left_out_and_keep_a_gradient_of_zero() -> None:
    model, without, x = vit(bias=True), vit(), pixels()
    without.load_state_dict(model.state_dict(), strict=False)
    for name, parameter in model.named_parameters():
        if name.endswith(("q_proj.bias", "k_proj.bias")):
            nn.init.normal_(parameter)
    expected = without(x).logits
    convert(model, rules("int8"), min_coverage=0)
    attention_of(model).query_key.weight_quantizer.enabled = False
    off(model)
    assert torch.allclose(model(x).logits, expected, atol=1e-5)
    model(x).logits.sum().backward()
    assert attention_of(model).q_proj.bias.grad.abs().max() == 0


def test_values_and_gradients_are_those_of_the_naive_formula() -> None:
    """x . Q2(Q(M) x): quantizers under plain autograd, one head at a time."""
    model, x = vit(), torch.randn(2, 5, 32)
    convert(model, rules("int4", input="int4-token", output="int6-token"), min_coverage=0)
    attention, grads = attention_of(model), []
    factors = attention.q_proj.weight, attention.k_proj.weight
    seen, middle = attention.query_key(x)
    scores = torch.einsum("bic,bjhc->bhij", seen, middle.unflatten(-1, (2, 32)))
    q_x, q_w, q_2 = parse("int4-token"), parse("int4"), parse("int6-token")
    x_hat, products = q_x(x), [q.t() @ k for q, k in zip(*(f.split(16) for f in factors), strict=True)]
    i = q_2(torch.cat([x_hat @ q_w(m).t() for m in products], dim=-1)).split(32, dim=-1)
    naive = torch.stack([x_hat @ each.mT for each in i], dim=1)
    assert torch.allclose(scores, naive, atol=1e-4)
    grad = torch.randn_like(naive)
    for y in (scores, naive):
        grads.append(torch.autograd.grad(y, factors, grad))
    for found, wanted in zip(*grads, strict=True):
        assert torch.allclose(found, wanted, atol=1e-3)
        assert wanted.abs().max() > 0


def test_no_copy_of_the_product_is_kept_for_backward() -> None:
    model, x = vit(), torch.randn(2, 5, 32)
    convert(model, rules("int4"), min_coverage=0)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        attention_of(model).query_key(x)
    assert {tuple(t.shape) for t in kept} <= {(2, 5, 32), (32, 32), (32, 1), (64, 1)}  # never (64, 32), both heads' M


def test_the_probabilities_are_quantized_too() -> None:
    model, x = vit(), pixels()
    expected = model(x).logits
    convert(model, rules("int8", attention="uint2"), min_coverage=0)
    attention_of(model).query_key.weight_quantizer.enabled = False
    coarse = model(x).logits
    off(model)
    assert torch.allclose(model(x).logits, expected, atol=1e-5)
    assert not torch.allclose(coarse, expected, atol=1e-4)


def test_a_checkpoint_loads_without_naming_it_and_restore_gives_the_plain_model_back() -> None:
    model, x = vit(bias=True, layers=2), pixels()
    names, before = list(model.state_dict()), model(x).logits
    convert(model, {"*": "int8", **rules(statsq(4), input="int8-token")}, min_coverage=0)
    convert(model, {"*": "int8", **rules(statsq(4), input="int8-token")}, min_coverage=0)  # again changes nothing
    assert set(names) <= set(model.state_dict())
    other = vit(bias=True, layers=2)
    convert_like(other, model.state_dict())
    other.load_state_dict(model.state_dict())
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert copied.vit.layers[0].attention.query_key.attention is copied.vit.layers[0].attention
    for twin in (other, copied, pickled):
        assert torch.equal(twin.eval()(x).logits, model.eval()(x).logits)
    assert not torch.allclose(model(x).logits, before, atol=1e-6)
    restore(model)
    assert list(model.state_dict()) == names
    assert torch.equal(model(x).logits, before)


def test_the_factors_must_stay_in_float() -> None:
    wrong = {"*": "int8", "attention": Scheme(attention="uint8", transform=QueryKeyProduct()), "query_key": "int8"}
    with pytest.raises(ValueError, match="'q_proj': None"):
        convert(vit(), wrong)


def test_attention_that_does_more_is_refused() -> None:
    config = transformers.LlamaConfig(
        hidden_size=32,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        num_hidden_layers=1,
        vocab_size=8,
    )
    with pytest.raises(ValueError, match="is causal"):
        convert(
            transformers.LlamaForCausalLM(config),
            {"self_attn": Scheme(attention="uint8-token", transform=QueryKeyProduct())},
            min_coverage=0,
        )


def test_rotary_embedding_grouped_heads_and_norms_are_named() -> None:
    from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTAttention, DINOv3ViTConfig

    config = DINOv3ViTConfig(
        hidden_size=32, num_attention_heads=2, intermediate_size=32, num_hidden_layers=1, attn_implementation="sdpa"
    )
    with pytest.raises(ValueError, match=r"does more .*apply_rotary_pos_emb"):
        convert(
            nn.ModuleDict({"attention": DINOv3ViTAttention(config)}),
            {"attention": Scheme(attention="uint8", transform=QueryKeyProduct())},
            min_coverage=0,
        )


def test_a_transform_for_weights_leaves_attention_alone() -> None:
    from qlightning.transforms.hadamard import Hadamard

    model, x = vit(), pixels()
    scheme = Scheme("int8", attention="uint8", transform=Hadamard())
    convert(model, {"*": scheme, "projection": None})
    attention = attention_of(model)
    assert isinstance(attention.q_proj.transform, Hadamard)
    assert not hasattr(attention, "transform")
    assert model(x).logits.isfinite().all()
