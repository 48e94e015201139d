"""Conversion of whole models: once or not at all, in place, and with tied weights as stated."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from qlightning.layers.convert import convert, convert_present, quantizers_of, restore
from qlightning.layers.layer import Twin
from qlightning.layers.rules import Rules
from qlightning.layers.swap import convert_like
from qlightning.numerics import AbsMax, Int, Learned, PerChannel, Quantizer


def model():
    return nn.Sequential(nn.Linear(32, 32), nn.Conv1d(4, 4, 3), nn.Linear(32, 24), nn.Embedding(6, 30))


def is_plain(module):
    return not any(isinstance(layer, Twin) for layer in module.modules()) and not list(quantizers_of(module))


# --- all or nothing ---


@pytest.mark.parametrize(
    ("rules", "arguments", "message"),
    [
        ("int4-g32", {}, r"1 \(Conv1d\): group size 32 does not divide 12 columns"),
        ({"*": "int4-g4", "9": "int8"}, {}, "matches no layer"),
        ({"*": "int4-g4", "3": "int8-g7"}, {}, "group size 7"),
        ({"*": "int4-g4", "0": "int2", "type:Linear": "int8"}, {}, "decides nothing"),
        ({"*": "int4-g4", "0": {"weight": "int4", "kv_cache": "int8-token"}}, {}, "kv_cache"),
        ({"0": {"weight": "int4"}, "1": None, "2": None}, {"tied": "sometimes"}, "tied='float' or tied='share'"),
        ({"*": {"weight": "int4", "output": "int8-tensor-lsq", "input": "int8-g5"}}, {}, "group size 5"),
    ],
)
def test_a_failed_conversion_leaves_the_model_as_it_was(rules, arguments, message):
    net = model()
    keys, parameters = list(net.state_dict()), list(net.parameters())
    with pytest.raises(ValueError, match=message):
        convert(net, rules, **arguments)
    assert is_plain(net)
    assert [type(layer) for layer in net] == [type(layer) for layer in model()]
    assert list(net.state_dict()) == keys
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))


def test_low_coverage_leaves_the_model_as_it_was():
    net = nn.Sequential(nn.Linear(8, 8), nn.Conv3d(8, 8, 3))
    with pytest.raises(ValueError, match="only"):
        convert(net, "int4")
    assert is_plain(net)


class Interrupted(AbsMax):
    """Somebody presses Ctrl-C while the second layer's scales are measured."""

    calls = 0

    def measure(self, blocks, format):
        Interrupted.calls += 1
        if Interrupted.calls == 2:
            raise KeyboardInterrupt
        return super().measure(blocks, format)


def test_an_interruption_leaves_the_model_as_it_was():
    net = model()
    with pytest.raises(KeyboardInterrupt):
        convert(net, Quantizer(Int(4), PerChannel(), scale=Learned(Interrupted())))
    assert Interrupted.calls == 2
    assert is_plain(net)


def test_what_was_converted_before_stays_so_when_a_later_call_fails():
    net = model()
    convert(net, {"0": "int4-g8"}, min_coverage=0.0)
    with pytest.raises(ValueError, match="group size 32 does not divide"):
        convert(net, {"0": "int4-g8", "1": "int4-g32"}, min_coverage=0.0)
    assert isinstance(net[0], Twin)
    assert not isinstance(net[1], Twin)


# --- errors that print the corrected call ---


def test_a_group_size_that_does_not_divide_names_the_layer_and_a_size_that_does():
    net = nn.Sequential(nn.Linear(32, 32), nn.Linear(24, 24), nn.Linear(48, 8))
    with pytest.raises(ValueError, match="2 layer") as error:
        convert(net, "int4-g32")
    text = str(error.value)
    assert "1 (Linear): group size 32 does not divide 24 columns" in text
    assert "2 (Linear): group size 32 does not divide 48 columns (shape (8, 48)): 'g16' would" in text
    assert "rules={'1': None}" in text
    convert(net, {"*": "int4-g32", "1": None, "2": "int4-g16"})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(value):
    net = model()
    with torch.no_grad():
        net[2].weight[3, 4] = value
    with pytest.raises(ValueError, match=r"2 \(Linear\): its weight holds NaN or infinity"):
        convert(net, "int4")
    assert is_plain(net)
    convert(net, {"*": "int4", "2": None})


# --- again ---


@pytest.mark.parametrize("scheme", ["int4-g4", "int4-sr", {"weight": "int4-lsq", "input": "int8-tensor-ema"}])
def test_conversion_by_the_same_rules_changes_nothing(scheme):
    net = model()
    rules = {"*": scheme, "2": "int8", "type:Embedding": "int8-g5"}
    first = convert(net, rules)
    quantizers, keys = dict(quantizers_of(net)), list(net.state_dict())
    for scale in (p for _, quantizer in quantizers.items() for p in quantizer.parameters()):
        scale.data.mul_(2)
    state = copy.deepcopy(net.state_dict())
    second = convert(net, rules)
    assert second.table() == first.table()
    assert all(quantizer is quantizers[name] for name, quantizer in quantizers_of(net))
    assert list(net.state_dict()) == keys
    assert all(torch.equal(state[key], value) for key, value in net.state_dict().items())


@pytest.mark.parametrize(
    "rules",
    [
        "int8",
        "int4-g8-clip",
        "int4-g8-sr",
        {"*": {"weight": "int4-g8", "input": "int8-token"}},
        {"*": {"input": "int8-token"}},
        {"*": "int4-g8", "0": None},
        {"*": "int4-g8", "0": "int4-g16"},
        {"0": None, "2": "int4-g8"},
    ],
    ids=str,
)
def test_other_rules_for_a_converted_model_are_an_error(rules):
    net = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    convert(net, "int4-g8")
    state = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=r"0 \(Linear\): it is converted already(.|\n)*qlightning\.restore\(module\)"):
        convert(net, rules)
    assert all(torch.equal(state[key], value) for key, value in net.state_dict().items())
    restore(net)
    convert(net, rules)


def test_an_embedding_that_is_not_asked_for_any_more_is_an_error():
    net = nn.Sequential(nn.Embedding(6, 8), nn.Linear(8, 8))
    convert(net, {"*": "int4", "0": "int8"})
    with pytest.raises(ValueError, match=r"0 \(Embedding\): it is converted already"):
        convert(net, "int4")


def test_layers_that_are_added_later_are_converted_by_the_next_call():
    net = nn.Sequential(nn.Linear(32, 32))
    rules = Rules({"*": "int4-g8", "1": "int8"})
    assert len(convert_present(net, rules).converted) == 1
    net.append(nn.Linear(32, 8))
    coverage = convert(net, {"*": "int4-g8", "1": "int8"})
    assert [row.quantizers["weight"] for row in coverage.rows] == ["int4-g8", "int8"]


def test_an_optimizer_built_before_conversion_moves_the_weights_and_one_built_after_it_the_scales():
    net = nn.Sequential(nn.Linear(32, 8))
    early = torch.optim.SGD(net.parameters(), lr=0.1)
    convert(net, "int4-lsq")
    late = torch.optim.SGD(net.parameters(), lr=0.1)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    net(torch.randn(4, 32)).sum().backward()
    early.step()
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"0.weight", "0.bias"}
    late.step()
    assert not torch.equal(net[0].quantizer("weight").scale.value, before["0.weight_quantizer.scale.value"])


def test_a_layer_used_under_two_names_is_one_layer():
    shared = nn.Linear(8, 8)
    net = nn.Sequential(shared, nn.ReLU(), shared)
    coverage = convert(net, "int4-lsq")
    assert [row.name for row in coverage.rows] == ["0"]
    assert coverage.weight_share == 1.0
    fresh_layer = nn.Linear(8, 8)
    fresh = nn.Sequential(fresh_layer, nn.ReLU(), fresh_layer)
    convert_like(fresh, net.state_dict())
    fresh.load_state_dict(net.state_dict())
    x = torch.randn(2, 8)
    assert torch.equal(fresh(x), net(x))


def test_a_single_layer_is_converted_in_place():
    layer = nn.Linear(8, 8)
    assert convert(layer, "int4").weight_share == 1.0
    assert isinstance(layer, Twin)
    assert type(restore(layer)) is nn.Linear


# --- tied weights ---


def llama(*, tied=True, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


IDS = torch.arange(12).reshape(2, 6)
SHARED = {"*": "int4-g8", "lm_head": "int8", "embed_tokens": "int8"}


def test_tied_weights_stay_in_float_by_default_and_the_coverage_says_so():
    net = llama()
    coverage = convert(net, "int4-g8")
    rows = {row.name: row for row in coverage.rows}
    assert rows["lm_head"].tied_to == ("model.embed_tokens",)
    assert rows["model.embed_tokens"].tied_to == ("lm_head",)
    assert net.lm_head.weight is net.model.embed_tokens.weight
    assert not isinstance(net.lm_head, Twin)
    assert "weight tied to model.embed_tokens" in coverage.table()
    assert sum(row.weights for row in coverage.rows) == sum(p.numel() for p in llama().parameters())


def test_two_tied_linear_layers_say_what_would_quantize_them():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    net[2].weight = net[0].weight
    coverage = convert(net, "int4")
    assert [bool(row.quantizers) for row in coverage.rows] == [False, True, False]
    assert "tied='share' quantizes both alike" in coverage.rows[0].reason
    assert coverage.rows[0].chosen


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens", "type:Embedding"])
def test_to_name_a_tied_layer_without_a_policy_is_an_error(name):
    net = llama()
    with pytest.raises(ValueError, match=r"its weight is tied.*tied='share'"):
        convert(net, {"*": "int4-g8", name: "int8"})
    assert is_plain(net)


def test_to_share_with_a_layer_that_has_no_rule_is_an_error_that_names_it():
    for rules, missing in (
        ({"*": "int4-g8", "lm_head": "int8"}, "model.embed_tokens"),
        ({"*": "int4-g8", "embed_tokens": "int8"}, "lm_head"),
    ):
        net = llama()
        with pytest.raises(ValueError, match=f"no rule gives '{missing}' a scheme.*'{missing}': ") as error:
            convert(net, rules, tied="share")
        assert "tied='float'" in str(error.value)
        assert is_plain(net)


def test_to_share_with_two_specs_is_an_error():
    net = llama()
    with pytest.raises(ValueError, match=r"lm_head.*shares its weight with 'model\.embed_tokens', which has '?int8"):
        convert(net, {"*": "int4-g8", "embed_tokens": "int8", "lm_head": "int4-g8"}, tied="share")
    assert is_plain(net)


@pytest.mark.parametrize("spec", ["int8", "int4-lsq", "int4-g8"])
def test_shared_weights_have_one_quantizer_and_the_gradient_of_both_uses(spec):
    net = nn.Module()
    net.embed, net.head = nn.Embedding(10, 16), nn.Linear(16, 10, bias=False)
    net.head.weight = net.embed.weight
    convert(net, {"embed": spec, "head": spec}, tied="share")
    quantizer = net.head.quantizer("weight")
    assert quantizer is net.embed.quantizer("weight")
    assert net.head.weight is net.embed.weight
    weight = net.head.weight.detach().clone().requires_grad_()
    reference = copy.deepcopy(quantizer)
    ids = torch.tensor([[1, 4, 4]])
    net.head(net.embed(ids).tanh()).square().sum().backward()
    table = reference(weight)
    F.linear(F.embedding(ids, table).tanh(), table).square().sum().backward()
    torch.testing.assert_close(net.head.weight.grad, weight.grad)
    for ours, theirs in zip(quantizer.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert len(list(quantizers_of(net))) == 1


def test_a_shared_quantizer_survives_saving_loading_copies_and_a_second_conversion():
    rules = {"*": "int4-g8", "lm_head": "int4-lsq", "embed_tokens": "int4-lsq"}
    net = llama()
    coverage = convert(net, rules, tied="share")
    assert {"lm_head", "model.embed_tokens"} <= {row.name for row in coverage.converted}
    assert convert(net, rules, tied="share").table() == coverage.table()
    with torch.no_grad():
        net.lm_head.quantizer("weight").scale.value.mul_(1.5)
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    fresh = llama(seed=1)
    convert_like(fresh, state)
    fresh.load_state_dict(state, strict=True)
    for other in (fresh, copy.deepcopy(net)):
        assert other.lm_head.quantizer("weight") is other.model.embed_tokens.quantizer("weight")
        assert other.lm_head.quantizer("weight") is not net.lm_head.quantizer("weight")
        assert torch.equal(other(IDS).logits, net(IDS).logits)
    restore(net)
    assert is_plain(net)
    assert net.lm_head.weight is net.model.embed_tokens.weight


def test_a_shared_bias_is_no_shared_weight():
    """As BERT's head shares its bias with its decoder."""
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    net.bias = net[1].bias
    assert len(convert(net, "int4").converted) == 2
    restore(net)
    assert len(convert(net, "int4", tied="share").converted) == 2


def test_a_whole_language_model_trains():
    net = llama(tied=False)
    convert(net, {"*": {"weight": "int4-g8", "input": "int8-token"}})
    loss = net(IDS, labels=IDS).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert type(net.lm_head) is nn.Linear
