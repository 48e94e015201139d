"""The swap: what stays the user's, how converted layers are copied and stored, and that a failure changes nothing."""

import copy
import io
import pickle
import subprocess
import sys
import types

import pytest
import torch
from torch import nn

from qlightning.layers.convert import convert, restore
from qlightning.layers.layer import Twin
from qlightning.layers.swap import convert_like, schemes_in

BOTH = {"weight": "int4-lsq", "input": "int8-token"}


def model():
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8), nn.LayerNorm(8))


def converted(scheme=BOTH, **rules):
    net = model()
    convert(net, {"*": scheme, **rules})
    return net


def plain_state(net):
    return {key: value.clone() for key, value in net.state_dict().items() if "_quantizer." not in key}


class Named(nn.Linear):
    """A user's subclass without a forward of its own."""

    def __init__(self, *args):
        super().__init__(*args)
        self.note = "mine"

    def doubled(self):
        return 2 * self.weight


class Own(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


# --- law 2 ---


def test_parameters_names_hooks_and_attributes_stay_the_users():
    net = model()
    before = dict(net.named_parameters())
    keys, calls = set(net.state_dict()), []
    net[0].tag = "a user's"
    net[0].register_forward_hook(lambda *_: calls.append("forward"))
    net[0].register_forward_pre_hook(lambda *_: calls.append("before"))
    net[0].weight.register_hook(lambda grad: calls.append("gradient"))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    convert(net, {"*": BOTH})
    after = dict(net.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert all(name in before or ".weight_quantizer." in f".{name}" for name in after)
    added = set(net.state_dict()) - keys
    assert keys <= set(net.state_dict())
    assert {key.split("_quantizer.")[0] for key in added} == {"0.weight", "0.input", "2.weight", "2.input"}
    assert net[0].tag == "a user's"
    assert isinstance(net[0], nn.Linear)
    weight = net[0].weight.detach().clone()
    net(torch.randn(4, 32)).sum().backward()
    optimizer.step()
    assert calls == ["before", "forward", "gradient"]
    assert not torch.equal(net[0].weight, weight)
    assert str(net).count("Quantizer(") == 4


def test_a_float_checkpoint_loads_strictly_into_a_converted_model():
    source, net = model(), converted()
    net.load_state_dict(source.state_dict(), strict=True)
    assert all(torch.equal(net.state_dict()[key], value) for key, value in source.state_dict().items())


@pytest.mark.parametrize("spec", ["int4-lsq", "int4-g8-asym-learned", "int8-ema"])
def test_scales_follow_a_float_checkpoint_that_is_loaded_after_conversion(spec):
    source, late = model(), converted(spec)
    with torch.no_grad():
        source[0].weight.mul_(10)
    late.load_state_dict(source.state_dict())
    early = copy.deepcopy(source)
    convert(early, spec)
    x = torch.randn(4, 32)
    assert torch.equal(late.eval()(x), early.eval()(x))


def test_scales_stay_when_a_checkpoint_has_other_layers_only_or_scales_of_its_own():
    net = converted()
    with torch.no_grad():
        net[0].quantizer("weight").scale.value.fill_(0.125)
    net.load_state_dict({key: value for key, value in model().state_dict().items() if key[0] != "0"}, strict=False)
    assert (net[0].quantizer("weight").scale.value == 0.125).all()
    again = converted()
    again.load_state_dict(net.state_dict())
    assert (again[0].quantizer("weight").scale.value == 0.125).all()


@pytest.mark.parametrize("scheme", [BOTH, "int4-g8", "nvfp4", {"weight": "int8-asym-learned", "output": "int8-token"}])
def test_a_converted_checkpoint_makes_a_float_model_equal(scheme):
    net = converted(scheme, **{"2": "int3-sr"})
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.5)
    net[0].quantizer("weight").enabled = False
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    fresh = model()
    with torch.no_grad():
        fresh[0].weight.fill_(float("nan"))  # uninitialized memory may hold anything
    convert_like(fresh, state)
    fresh.load_state_dict(state, strict=True)
    x = torch.randn(4, 32)
    assert torch.equal(fresh(x), net(x))
    assert fresh[0].quantizer("weight").enabled is False
    assert schemes_in(fresh.state_dict()).keys() == {"0", "2"}
    convert_like(fresh, state)  # and once more, as for a checkpoint loaded twice
    convert(fresh, {"*": scheme, "2": "int3-sr"})
    assert torch.equal(fresh(x), net(x))


def test_a_float_checkpoint_converts_nothing():
    net = model()
    convert_like(net, net.state_dict())
    assert not any(isinstance(layer, Twin) for layer in net.modules())


def test_a_checkpoint_of_a_single_layer():
    layer = nn.Linear(32, 8)
    convert(layer, "int4-g8")
    fresh = nn.Linear(32, 8)
    convert_like(fresh, layer.state_dict())
    fresh.load_state_dict(layer.state_dict())
    x = torch.randn(4, 32)
    assert torch.equal(fresh(x), layer(x))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (nn.Sequential(nn.Linear(32, 32)), "quantizes '2', which Sequential does not have"),
        (nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.LayerNorm(32)), "quantizes '2', which is a LayerNorm here"),
        (nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(30, 8)), r"'2' as .*int4-g8.* group size 8 does not"),
    ],
)
def test_a_checkpoint_of_another_model_is_an_error_and_changes_nothing(other, message):
    with pytest.raises(ValueError, match=message):
        convert_like(other, converted("int4-g8").state_dict())
    assert type(other[0]) is nn.Linear
    assert not any("_quantizer" in key for key in other.state_dict())


def test_a_checkpoint_of_another_scheme_is_an_error_that_names_both():
    with pytest.raises(ValueError, match=r"'2' as .*int4-lsq.*converted already, with weight 'int8'"):
        convert_like(converted(**{"2": "int8"}), converted().state_dict())
    with pytest.raises(ValueError, match="holds a quantizer 'int4-g8' where the model has 'int8'"):
        converted("int8").load_state_dict(converted("int4-g8").state_dict())


def test_restore_gives_back_the_plain_model_with_its_weights_as_they_are():
    net = converted()
    keys = list(model().state_dict())
    with torch.no_grad():
        net[0].weight.add_(1)
    parameters = dict(net.named_parameters())
    weights = plain_state(net)
    assert restore(net) is net
    assert [type(layer) for layer in net] == [nn.Linear, nn.ReLU, nn.Linear, nn.LayerNorm]
    assert list(net.state_dict()) == keys
    assert all(parameters[name] is parameter for name, parameter in net.named_parameters())
    plain = model()
    plain.load_state_dict(weights)
    x = torch.randn(4, 32)
    assert torch.equal(net(x), plain(x))
    convert(net, "int8")  # and another scheme is welcome now
    restore(restore(net))


# --- copies and files ---


def test_deepcopies_are_apart_and_equal():
    net = converted()
    twin = copy.deepcopy(net)
    x = torch.randn(4, 32)
    assert torch.equal(net(x), twin(x))
    assert type(twin[0]) is type(net[0])
    with torch.no_grad():
        twin[0].quantizer("weight").scale.value.mul_(3)
    assert not torch.equal(net(x), twin(x))
    restore(twin)
    assert isinstance(net[0], Twin)


def test_whole_modules_are_pickled_and_saved():
    net = converted()
    x = torch.randn(4, 32)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for loaded in (pickle.loads(pickle.dumps(net)), torch.load(file, weights_only=False)):
        assert torch.equal(loaded(x), net(x))
        restore(loaded)
        assert type(loaded[0]) is nn.Linear


def test_a_saved_module_is_loaded_by_a_process_that_converted_nothing(tmp_path):
    net, x = converted(), torch.randn(4, 32)
    torch.save({"net": net, "x": x, "y": net(x).detach()}, tmp_path / "net.pt")
    program = (
        "import sys, torch; saved = torch.load(sys.argv[1], weights_only=False); "
        "assert torch.equal(saved['net'](saved['x']), saved['y']); print(type(saved['net'][0]).__name__)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "net.pt")]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() == "QuantLinear"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_model_keeps_float32_scales(dtype):
    net = converted({"weight": "int4-lsq", "input": "int8-tensor-ema"}).to(dtype)
    assert net[0].weight.dtype == dtype
    quantizers = [quantizer for _, quantizer in net[0].quantizers()]
    state = [tensor for quantizer in quantizers for tensor in (*quantizer.parameters(), *quantizer.buffers())]
    assert len(state) > 3
    assert {tensor.dtype for tensor in state} == {torch.float32}


def test_on_the_meta_device_until_a_checkpoint_comes():
    source, net = converted(), model().to("meta")
    convert(net, {"*": BOTH})
    assert net[0].quantizer("weight").scale.value.is_meta
    net = net.to_empty(device="cpu")
    with pytest.raises(ValueError, match="no scale yet"):
        net(torch.randn(4, 32))
    net.load_state_dict(source.state_dict())
    x = torch.randn(4, 32)
    assert torch.equal(net(x), source(x))


def test_a_float_checkpoint_settles_what_was_converted_on_the_meta_device():
    source, net = model(), model().to("meta")
    convert(net, {"*": BOTH})
    net = net.to_empty(device="cpu")
    net.load_state_dict(source.state_dict())
    convert(source, {"*": BOTH})
    x = torch.randn(4, 32)
    assert torch.equal(net(x), source(x))


# --- which layers ---


def test_a_subclass_without_its_own_forward_is_converted_and_stays_itself():
    net = nn.Sequential(Named(16, 16))
    convert(net, "int4-lsq")
    assert isinstance(net[0], Named)
    assert net[0].note == "mine"
    assert torch.equal(net[0].doubled(), 2 * net[0].weight)
    loaded = pickle.loads(pickle.dumps(net)) if Named.__module__ in sys.modules else copy.deepcopy(net)
    assert loaded[0].note == "mine"
    assert type(restore(loaded)[0]) is Named


def test_a_subclass_with_its_own_forward_is_reported_and_left_alone():
    net = nn.Sequential(Own(16, 16), nn.Linear(16, 16))
    coverage = convert(net, "int4")
    assert type(net[0]) is Own
    assert coverage.rows[0].reason == "no quantized twin of Own"
    assert not coverage.rows[0].chosen


def test_a_forward_replaced_on_the_instance_is_reported_and_left_alone():
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    net[0].forward = types.MethodType(lambda self, x: 2 * x, net[0])
    coverage = convert(net, "int4")
    assert type(net[0]) is nn.Linear
    assert "forward was replaced on the instance" in coverage.rows[0].reason


def test_the_projection_that_attention_only_reads_is_no_layer_of_its_own():
    net = nn.Sequential(nn.modules.linear.NonDynamicallyQuantizableLinear(8, 8), nn.Linear(8, 8))
    convert(net, "int4")
    assert not isinstance(net[0], Twin)


def test_lazy_layers_are_an_error_that_says_what_to_do():
    net = nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 8))
    with pytest.raises(ValueError, match="'0' has no shape yet: run a batch"):
        convert(net, "int4")
    net(torch.randn(2, 4))
    assert len(convert(net, "int4").converted) == 2


def test_layers_whose_weight_is_computed_do_not_share_a_quantizer():
    net = nn.Sequential(*[nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)) for _ in range(3)])
    convert(net, "int4-lsq", min_coverage=0.0)
    assert len({id(layer.quantizer("weight")) for layer in net}) == 3
    y = net(torch.randn(2, 8))
    y.sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_quantizers_follow_the_mode_of_their_layer(training):
    net = model().train(training)
    convert(net, {"*": {"weight": "int4-sr", "input": "int8-token-sr"}})
    assert {module.training for module in net.modules()} == {training}
    if not training:
        assert net[0].quantizer("weight").rounding.key() is None


def test_layers_do_not_round_with_the_same_random_numbers():
    net = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    net[1].load_state_dict(net[0].state_dict())
    convert(net, "int2-sr")
    x = torch.eye(64)
    assert not torch.equal(net[0](x), net[1](x))
    again = copy.deepcopy(net)
    restore(again)
    convert(again, "int2-sr")
    assert torch.equal(again[0](x), net[0](x))


def test_the_groups_of_an_output_quantizer_divide_the_output():
    net = nn.Sequential(nn.Linear(48, 64))
    convert(net, {"*": {"weight": "int4", "output": "int8-g32"}})
    assert net(torch.randn(2, 48)).shape == (2, 64)
    with pytest.raises(ValueError, match=r"group size 32 does not divide 48 columns.*'g16'"):
        convert(nn.Sequential(nn.Linear(64, 48)), {"*": {"weight": "int4", "output": "int8-g32"}})


def test_a_class_that_somebody_put_on_top_is_seen_through_but_not_taken_off():
    """As FSDP2 does: it changes the class of a module to a subclass of it."""
    net = nn.Sequential(nn.Linear(16, 16))
    convert(net, "int4")
    net[0].__class__ = type("FSDPQuantLinear", (type(net[0]),), {})
    coverage = convert(net, "int4")
    assert coverage.rows[0].kind == "Linear"
    with pytest.raises(ValueError, match="FSDPQuantLinear cannot be restored"):
        restore(net)
    assert net(torch.randn(2, 16)).shape == (2, 16)
