"""torch's own transformer: projections that are read and not called, and a kernel that reads past quantizers."""

import copy
import pickle

import pytest
import torch
from lightning.pytorch.demos import Transformer
from torch import nn

from qlightning.layers.convert import convert, quantizers_of, restore
from qlightning.layers.coverage import count_multiply_adds
from qlightning.layers.scheme import Scheme
from qlightning.layers.swap import convert_like
from qlightning.numerics.spec import parse

SPEC = "int4-g4"
NAMES = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@torch.no_grad()
def quantize_by_hand(module: nn.Module, spec: str = SPEC) -> nn.Module:
    """A copy whose weights were replaced by quantized ones."""
    copied = copy.deepcopy(module)
    for layer in copied.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.copy_(parse(spec)(layer.weight))
        for name in NAMES:
            if isinstance(weight := getattr(layer, name, None), nn.Parameter):
                weight.copy_(parse(spec)(weight))
    return copied


def gradients(module: nn.Module, *inputs: torch.Tensor, **options: object) -> dict[str, torch.Tensor]:
    module.zero_grad()
    output = module(*inputs, **options)
    y = output[0] if isinstance(output, tuple) else output
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"kdim": 4, "vdim": 12},
        {"add_bias_kv": True, "add_zero_attn": True},
    ],
)
def test_attention_is_the_plain_one_on_quantized_weights(options):
    plain = nn.MultiheadAttention(8, 2, batch_first=True, **options)
    reference, model = quantize_by_hand(plain), nn.ModuleList([copy.deepcopy(plain)])
    coverage = convert(model, SPEC)
    (row,) = coverage.rows
    assert row.weights == sum(p.numel() for p in plain.parameters())
    expected = {"in_proj_weight", "out_proj_weight"} if "kdim" not in options else {*NAMES[1:], "out_proj_weight"}
    assert set(row.quantizers) == expected

    inputs = [torch.randn(3, 5, size) for size in (8, options.get("kdim", 8), options.get("vdim", 8))]
    mask = torch.ones(5, 5).triu(1).bool()
    for ours, theirs in zip(model[0](*inputs, attn_mask=mask), reference(*inputs, attn_mask=mask), strict=True):
        torch.testing.assert_close(ours, theirs)
    got, wanted = gradients(model[0], *inputs), gradients(reference, *inputs)
    assert {"out_proj.weight", *(NAMES[1:] if "kdim" in options else NAMES[:1])} <= set(got)
    for name, grad in wanted.items():
        torch.testing.assert_close(got[name], grad, msg=name)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("rules", [SPEC, {"*": SPEC, "self_attn": None}, {"*": SPEC, "type:Linear": None}])
def test_eval_without_gradients_is_training_without_dropout(rules, norm_first):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first)
    model, x = nn.Sequential(layer), torch.randn(3, 5, 8)
    model.eval()
    with torch.no_grad():
        plain = model(x)
        convert(model, rules, min_coverage=0)
        fast = model(x)
    slow = model.train()(x)
    torch.testing.assert_close(fast, slow.detach())
    assert (fast - plain).abs().max() > 1e-3
    with torch.no_grad():
        torch.testing.assert_close(restore(model).eval()(x), plain, rtol=0, atol=0)
    assert type(layer) is nn.TransformerEncoderLayer
    assert layer.activation_relu_or_gelu == 1


def test_a_padded_batch_is_not_packed_into_nested_tensors():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(3, 5, 8), torch.arange(5) >= torch.tensor([5, 3, 2])[:, None]
    convert(encoder, SPEC)
    with torch.no_grad():
        fast = encoder(x, src_key_padding_mask=padding)
    slow = encoder.train()(x, src_key_padding_mask=padding)
    torch.testing.assert_close(fast[~padding], slow.detach()[~padding])
    restore(encoder)
    assert encoder.use_nested_tensor
    assert type(encoder) is nn.TransformerEncoder


def test_a_layer_in_which_nothing_was_converted_stays_plain():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.ModuleDict({"encoder": layer, "head": nn.Linear(8, 8)})
    convert(model, {"head": SPEC}, min_coverage=0)
    assert type(layer) is nn.TransformerEncoderLayer


def test_lightnings_demo_transformer():
    torch.manual_seed(0)
    model = Transformer(vocab_size=16, ninp=8, nhead=2, nhid=16, nlayers=1, dropout=0.0)
    ids, keys = torch.arange(12).view(2, 6), set(model.state_dict())
    target, reference, plain = ids.flip(1), quantize_by_hand(model), model(ids, ids.flip(1))
    coverage = convert(model, {"*": SPEC, "decoder": SPEC})
    assert len([row for row in coverage.converted if row.kind == "MultiheadAttention"]) == 3
    assert not [row for row in coverage.rows if "out_proj" in row.name]
    assert coverage.reachable_share == 1.0

    trained = model(ids, target)
    torch.testing.assert_close(trained, reference(ids, target))
    assert not torch.allclose(trained, plain, atol=1e-3)
    model.eval()
    with torch.no_grad(), count_multiply_adds(model, coverage):
        torch.testing.assert_close(model(ids, target), trained)
    counted = {row.name: row.multiply_adds for row in coverage.rows if "attn" in row.name}
    assert set(counted.values()) == {ids.numel() * 4 * 8 * 8}

    loaded = Transformer(vocab_size=16, ninp=8, nhead=2, nhid=16, nlayers=1, dropout=0.0)
    convert_like(loaded, model.state_dict())
    loaded.load_state_dict(model.state_dict())
    with torch.no_grad():
        for copied in (loaded.eval(), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(copied(ids, target), trained)
    restore(model)
    assert set(model.state_dict()) == keys
    torch.testing.assert_close(model.train()(ids, target), plain)


def test_multiply_adds_of_a_call_by_name():
    model, x = nn.ModuleList([nn.MultiheadAttention(8, 2)]), torch.randn(5, 3, 8)
    coverage = convert(model, SPEC)
    with count_multiply_adds(model, coverage):
        model[0](query=x, key=x, value=x)
    assert coverage.rows[0].multiply_adds == 5 * 3 * 4 * 8 * 8


def test_input_and_output_quantizers():
    plain, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(3, 5, 8)
    memory = torch.randn(3, 4, 8)
    model = nn.ModuleList([copy.deepcopy(plain)])
    convert(model, Scheme(input="int4-token", output="int8-token"))
    narrow, wide = parse("int4-token"), parse("int8-token")
    for key in (x, memory):
        y, weights = model[0](x, key, key)
        expected, expected_weights = plain(narrow(x), narrow(key), narrow(key))
        torch.testing.assert_close(y, wide(expected))
        torch.testing.assert_close(weights, expected_weights)


def test_learned_scales_are_trained_and_wait_while_bypassed():
    model, x = nn.ModuleList([nn.MultiheadAttention(8, 2)]), torch.randn(5, 3, 8)
    convert(model, Scheme("int4-channel-lsq"))
    scales = {"in_proj_weight_quantizer.scale.value", "out_proj_weight_quantizer.scale.value"}
    got = gradients(model[0], x, x, x)
    assert all(got[name].abs().sum() > 0 for name in scales)
    for _, quantizer in quantizers_of(model):
        quantizer.enabled = False
    waiting = gradients(model[0], x, x, x)
    assert all(not waiting[name].any() for name in scales)
    assert waiting["in_proj_weight"].any()


def test_no_copy_of_a_weight_is_saved():
    def saved(layer: nn.Module) -> int:
        known = {p.untyped_storage().data_ptr() for p in layer.parameters()}
        kept: dict[int, torch.Tensor] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in known:
                kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layer(x, x, x, need_weights=False)
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

    x, model = torch.randn(2, 3, 32), nn.ModuleList([nn.MultiheadAttention(32, 2)])
    plain = saved(model[0])
    convert(model, "int4-g32")
    assert saved(model[0]) == plain


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_no_graph_break_under_torch_compile():
    model, x = nn.ModuleList([nn.MultiheadAttention(8, 2)]), torch.randn(5, 3, 8)
    convert(model, SPEC)
    compiled = torch.compile(model[0], fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, x, x)[0], model[0](x, x, x)[0])
