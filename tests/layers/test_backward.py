"""Backward with quantized operands, against the three products written out with the quantizers themselves."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qlightning import Scheme, convert, restore
from qlightning.adapters import LoRA
from qlightning.layers.backward import Backward
from qlightning.layers.swap import convert_like
from qlightning.numerics import Float, PerGroup, Quantizer, Stochastic, TwoLevel, parse
from qlightning.numerics.transform import Basis


class Reflected(Basis):
    """A reflection in every block of 16: orthogonal, its own inverse, and no permutation."""

    def build(self, matrix: Tensor, features: int) -> None:
        if features % 16:
            raise ValueError(f"blocks of 16 do not divide {features}")

    def forward(self, x: Tensor) -> Tensor:
        normal = torch.arange(1.0, 17.0, device=x.device)
        mirror = torch.eye(16, device=x.device) - 2 * torch.outer(normal, normal) / normal.square().sum()
        return (x.unflatten(-1, (-1, 16)) @ mirror).flatten(-2)

    def inverse(self, x: Tensor) -> Tensor:
        return self(x)


NVFP4 = {"grad_dgrad": "nvfp4", "grad_wgrad": "nvfp4", "input_wgrad": "nvfp4"}


def layer(backward: Backward | None, *, weight: str = "nvfp4-b16x16", input: str | None = "nvfp4", sizes=(32, 48)):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(*sizes))
    convert(model, {"*": Scheme(weight, input=input, backward=backward)})
    return model[0]


def pass_through(linear: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output and the gradients of input, weight and bias."""
    x = x.clone().requires_grad_()
    linear.zero_grad()
    y = linear(x)
    y.backward(grad)
    return y.detach(), x.grad, linear.weight.grad, linear.bias.grad


def data(*tokens: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(*tokens, 32), torch.randn(*tokens, 48)


def same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def transposed(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).t()


@pytest.mark.parametrize("rotation", [None, Reflected()], ids=["plain", "rotated"])
@pytest.mark.parametrize("weight_dgrad", ["same", None, "nvfp4"])
def test_each_product_has_the_operands_of_its_slots(rotation, weight_dgrad) -> None:
    x, grad = data(2, 16)
    linear = layer(Backward(**NVFP4, weight_dgrad=weight_dgrad, rotation=rotation))
    y, grad_x, grad_w, grad_b = pass_through(linear, x, grad)
    q, w, turn = parse("nvfp4"), linear.weight.detach(), rotation or (lambda t: t)
    tiles = parse("nvfp4-b16x16")(w)
    assert torch.equal(y, nn.functional.linear(q(x), tiles, linear.bias))
    assert torch.equal(grad_x, q(grad) @ {"same": tiles, None: w, "nvfp4": q(w.t()).t()}[weight_dgrad])
    assert torch.equal(grad_w, q(turn(transposed(grad))) @ q(turn(transposed(x))).t())
    assert torch.equal(grad_b, grad.sum((0, 1)))


@pytest.mark.parametrize("input", ["nvfp4", "int8-tensor-lsq", None])
@pytest.mark.parametrize("slot", ["same", None])
def test_the_input_of_wgrad_may_be_that_of_fprop_or_float(input, slot) -> None:
    x, grad = data(32)
    linear = layer(Backward(grad_wgrad="nvfp4", input_wgrad=slot), input=input)
    if input == "int8-tensor-lsq":
        linear.quantizer("input").initialize(x)
    kept = x if slot is None or input is None else linear.quantizer("input")(x)
    assert torch.equal(pass_through(linear, x, grad)[2], parse("nvfp4")(grad.t()) @ kept.detach())


def test_an_input_that_is_kept_anyway_is_quantized_again_in_backward() -> None:
    x, grad = data(32)
    linear = layer(Backward(input_wgrad="nvfp4"), input="int8-tensor-lsq")
    linear.quantizer("input").initialize(x)
    assert torch.equal(pass_through(linear, x, grad)[2], grad.t() @ parse("nvfp4")(x.t()).t())


@pytest.mark.parametrize("tokens", [(21,), (3, 7), (1,), (5, 16)])
def test_rotated_without_quantizers_wgrad_is_the_plain_one(tokens) -> None:
    """Tokens that do not fill a block are filled up with zeros, and the rotation cancels."""
    x, grad = data(*tokens)
    rotated = layer(Backward(rotation=Reflected(), input_wgrad=None), input=None)
    plain = transposed(grad.double()) @ x.double().reshape(-1, 32)
    error = pass_through(rotated, x, grad)[2].double() - plain
    assert float(error.norm() / plain.norm()) < 1e-6


def test_tokens_are_padded_with_zeros() -> None:
    x, grad = data(21)
    padded = [nn.functional.pad(t.t(), (0, 11)) for t in (grad, x)]
    q = parse("nvfp4")
    linear = layer(Backward(**NVFP4))
    assert torch.equal(pass_through(linear, x, grad)[2], q(padded[0]) @ q(padded[1]).t())


def test_a_layer_whose_weight_is_stored_transposed() -> None:
    from transformers.pytorch_utils import Conv1D

    x, grad = data(32)
    plain, backward = layer(Backward(**NVFP4, rotation=Reflected())), Backward(**NVFP4, rotation=Reflected())
    model = nn.Sequential(Conv1D(48, 32))
    with torch.no_grad():
        model[0].weight.copy_(plain.weight.t())
        model[0].bias.copy_(plain.bias)
    convert(model, {"*": Scheme("nvfp4-b16x16", input="nvfp4", backward=backward)})
    ours, theirs = pass_through(model[0], x, grad), pass_through(plain, x, grad)
    assert torch.allclose(ours[1], theirs[1], atol=1e-5)
    assert torch.equal(ours[2].t(), theirs[2])


def test_the_gradient_rule_of_the_weight_comes_after_wgrad() -> None:
    x, grad = data(32)
    linear = layer(Backward(grad_wgrad="nvfp4"), weight="int4-learned", input=None)
    linear.quantizer("weight").scale.value.data.mul_(0.3)  # so that some values saturate and their slope is 0
    got = pass_through(linear, x, grad)[2]
    expected = parse("nvfp4")(grad.t()) @ x
    assert 0 < int((got == 0).sum()) < got.numel()
    assert torch.equal(got[got != 0], expected[got != 0])


def test_an_adapter_inside_the_quantizer_learns_from_the_quantized_wgrad() -> None:
    x, grad = data(32)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48))
    convert(model, {"*": Scheme("nvfp4-b16x16", adapter=LoRA(rank=4), backward=Backward(**NVFP4))})
    adapter = model[0].adapter
    small = [p for p in adapter.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in small:
            parameter.normal_()
    x.requires_grad_()
    model(x).backward(grad)
    q, inside = parse("nvfp4"), adapter.inside()
    wgrad = q(grad.t()) @ q(x.detach().t()).t()
    for parameter, expected in zip(inside.tensors(), inside.gradients(wgrad, inside.tensors()), strict=True):
        assert torch.allclose(parameter.grad, expected, rtol=1e-4, atol=1e-4)
    effective = inside.effective(model[0].weight, inside.tensors()).detach()
    assert torch.equal(x.grad, q(grad) @ parse("nvfp4-b16x16")(effective))


def test_under_autocast_the_products_are_bfloat16() -> None:
    x, grad = data(32)
    linear = layer(Backward(**NVFP4, rotation=Reflected()))
    with torch.autocast("cpu", torch.bfloat16):
        _, grad_x, grad_w, _ = pass_through(linear, x, grad.bfloat16())
    q, turned = parse("nvfp4"), [Reflected()(t.t()) for t in (grad.bfloat16().float(), x)]
    expected = (q(turned[0]).bfloat16() @ q(turned[1]).bfloat16().t()).float()
    assert torch.equal(grad_w, expected)
    assert torch.equal(grad_x, (q(grad.bfloat16()) @ parse("nvfp4-b16x16")(linear.weight).bfloat16()).float())


def test_evaluation_knows_nothing_of_it() -> None:
    x, _ = data(32)
    with torch.no_grad():
        assert torch.equal(layer(Backward(**NVFP4)).eval()(x), layer(None).eval()(x))


# --- stochastic rounding ---

SR = {"grad_dgrad": "nvfp4-sr", "grad_wgrad": "nvfp4-sr", "input_wgrad": "nvfp4"}


def roundings(module: nn.Module) -> list[Stochastic]:
    return [child for child in module.modules() if isinstance(child, Stochastic)]


def test_a_step_has_its_noise_and_the_next_one_another() -> None:
    x, grad = data(32)
    linear = layer(Backward(**SR))
    first, again = pass_through(linear, x, grad), pass_through(linear, x, grad)
    assert same(first, again)
    for rounding in roundings(linear):
        rounding.advance()
    later = pass_through(linear, x, grad)
    assert torch.equal(later[0], first[0])  # the forward pass rounds to nearest
    assert not torch.equal(later[1], first[1])
    assert not torch.equal(later[2], first[2])
    linear.eval()
    nearest = pass_through(layer(Backward(**NVFP4)), x, grad)
    assert same(pass_through(linear, x, grad), nearest)


@pytest.mark.parametrize("slot", ["grad_dgrad", "weight_dgrad", "grad_wgrad", "input_wgrad"])
def test_every_slot_may_have_noise_which_moves_its_product_alone(slot) -> None:
    x, grad = data(32)
    linear = layer(Backward(**{slot: "nvfp4-sr"}))
    first = pass_through(linear, x, grad)
    assert same(pass_through(linear, x, grad), first)
    roundings(linear)[0].advance()
    still = [torch.equal(a, b) for a, b in zip(pass_through(linear, x, grad), first, strict=True)]
    assert still == [True, not slot.endswith("dgrad"), not slot.endswith("wgrad"), True]


def test_every_operand_of_every_layer_has_noise_of_its_own() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    backward = Backward(grad_dgrad="nvfp4-sr", grad_wgrad="nvfp4-sr", input_wgrad="nvfp4-sr")
    convert(model, {"*": Scheme("nvfp4", backward=backward)})
    assert len({rounding.seed for rounding in roundings(model)}) == 6


@pytest.mark.parametrize("weight", ["int8", "int8-sr"])
def test_processes_draw_different_noise_for_gradients_and_the_same_for_weights(weight) -> None:
    x, grad = data(32)
    linear = layer(Backward(grad_dgrad="nvfp4-sr"), weight=weight, input=None)
    passes = []
    for rank in (0, 1):
        dist.init_process_group("fake", rank=rank, world_size=2, store=_fake_store())
        try:
            passes.append(pass_through(linear, x, grad))
        finally:
            dist.destroy_process_group()
    assert torch.equal(passes[0][0], passes[1][0])
    assert not torch.equal(passes[0][1], passes[1][1])
    assert torch.equal(passes[0][1], pass_through(linear, x, grad)[1])


def _fake_store() -> object:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    return FakeStore()


def test_rounded_up_scales_make_the_noise_unbiased() -> None:
    """The mean of dX over 2000 draws; scales rounded to nearest clip maxima, which no number of draws averages out."""
    x, grad = data(4)
    exact, distance = grad @ parse("nvfp4-b16x16")(layer(None).weight.detach()), {}
    for rounding in ("up", "nearest"):
        slot = Quantizer(Float(2, 1), PerGroup(16), scale=TwoLevel(rounding=rounding), rounding=Stochastic())
        linear = layer(Backward(grad_dgrad=slot), input=None)
        draws = pass_through(linear, x.repeat(2000, 1), grad.repeat(2000, 1))[1]
        distance[rounding] = float((draws.view(2000, 4, 32).mean(0) - exact).norm() / exact.norm())
    assert distance["up"] < 0.01
    assert distance["nearest"] > 2 * distance["up"]


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_no_gradient(reentrant) -> None:
    x, grad = data(21)
    results = []
    for recompute in (False, True):
        linear = layer(Backward(**{**SR, "input_wgrad": "nvfp4-sr"}, rotation=Reflected()), weight="int4-g16-sr")
        leaf = x.clone().requires_grad_()
        y = checkpoint(linear, leaf, use_reentrant=reentrant) if recompute else linear(leaf)
        y.backward(grad)
        results.append([y.detach(), leaf.grad, *(p.grad for p in linear.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# --- memory and compilation ---


def saved_bytes(linear: nn.Module, x: Tensor) -> int:
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        linear(x)
    for parameter in linear.parameters():
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(storages.values())


@pytest.mark.parametrize(
    ("slots", "input", "per_value"),
    [
        (SR, "nvfp4", 1 + 4 / 16),  # the codes along tokens alone
        ({"grad_wgrad": "nvfp4-sr"}, "nvfp4", 1 + 4 / 16),  # the codes of fprop
        ({"input_wgrad": "int8-channel"}, None, 1.0),
        ({"input_wgrad": None}, "int8-token", 2.0),  # the input itself
    ],
)
def test_the_input_is_kept_once_and_as_codes_where_it_is_quantized(slots, input, per_value) -> None:
    x = torch.randn(256, 512, dtype=torch.bfloat16).requires_grad_()
    model = nn.Sequential(nn.Linear(512, 256, dtype=torch.bfloat16))
    convert(model, {"*": Scheme("nvfp4-b16x16", input=input, backward=Backward(**slots))})
    assert saved_bytes(model[0], x) <= 256 * 512 * per_value * 1.03
    model[0].weight.requires_grad_(False)
    model[0].bias.requires_grad_(False)
    assert saved_bytes(model[0], x) <= 256 * 512 * 0.26  # the state of fprop's input quantizer at most


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_it_compiles_without_a_graph_break_to_the_same_bits() -> None:
    x, grad = data(21)
    linear = layer(Backward(**SR, rotation=Reflected()))
    eager = pass_through(copy.deepcopy(linear), x, grad)
    torch._dynamo.reset()
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    x = x.clone().requires_grad_()
    y = compiled(x)
    y.backward(grad)
    torch._dynamo.reset()
    assert torch.equal(y, eager[0])
    for ours, theirs in zip((x.grad, linear.weight.grad, linear.bias.grad), eager[1:], strict=True):
        assert torch.equal(ours, theirs)


# --- life cycle ---


def test_it_acts_when_the_weights_quantizer_does() -> None:
    x, grad = data(32)
    linear, plain = layer(Backward(**NVFP4)), layer(None)
    for each in (linear, plain):
        for _, quantizer in each.quantizers():
            quantizer.enabled = False
    assert all(
        torch.equal(a, b) for a, b in zip(pass_through(linear, x, grad), pass_through(plain, x, grad), strict=True)
    )


def test_fprop_can_be_released_alone() -> None:
    """S78's late switch: the forward pass in float, the backward pass as before."""
    x, grad = data(32)
    linear = layer(Backward(**NVFP4, rotation=Reflected()))
    before = pass_through(linear, x, grad)
    for _, quantizer in linear.quantizers():
        quantizer.release()
    after = pass_through(linear, x, grad)
    assert torch.equal(after[0], nn.functional.linear(x, linear.weight, linear.bias))
    assert same(before[1:], after[1:])
    with torch.no_grad():
        assert torch.equal(linear(x), after[0])
    other = layer(Backward(**NVFP4, rotation=Reflected()))
    other.load_state_dict(linear.state_dict())
    assert same(pass_through(other, x, grad), after)
    for _, quantizer in linear.quantizers():
        quantizer.take_back()
    assert same(pass_through(linear, x, grad), before)


def test_each_product_of_backward_can_be_released_alone() -> None:
    x, grad = data(32)
    linear, plain = layer(Backward(**NVFP4)), layer(None)
    full, straight = pass_through(linear, x, grad), pass_through(plain, x, grad)
    for product, released in (("dgrad", (straight[1], full[2])), ("wgrad", (full[1], grad.t() @ x))):
        for quantizer in linear.backward.operands(product):
            quantizer.release()
        assert same(pass_through(linear, x, grad)[1:3], released)
        for quantizer in linear.backward.operands(product):
            quantizer.take_back()
    assert same(pass_through(linear, x, grad), full)


def test_released_learned_scales_stay_in_the_graph() -> None:
    x, grad = data(32)
    linear = layer(Backward(grad_dgrad="nvfp4"), weight="int4-lsq", input="int8-tensor-lsq")
    linear.quantizer("input").initialize(x)
    for _, quantizer in linear.quantizers():
        quantizer.release()
    linear(x.requires_grad_()).backward(grad)
    learned = [scale for _, quantizer in linear.quantizers() for scale in quantizer.learned()]
    assert len(learned) == 2
    assert all(scale.grad is not None and not bool(scale.grad.any()) for scale in learned)


def test_the_checkpoint_describes_it_and_holds_the_state_of_its_noise() -> None:
    x, grad = data(32)
    linear = layer(Backward(**SR, rotation=Reflected()))
    for rounding in roundings(linear):
        rounding.advance()
    fresh = nn.Sequential(nn.Linear(32, 48))
    state = {f"0.{name}": value for name, value in linear.state_dict().items()}
    convert_like(fresh, state)
    fresh.load_state_dict(state)
    assert fresh[0].backward == linear.backward
    assert all(
        torch.equal(a, b) for a, b in zip(*[pass_through(each, x, grad) for each in (fresh[0], linear)], strict=True)
    )
    with pytest.raises(ValueError, match="the checkpoint holds backward"):
        layer(Backward(**NVFP4)).load_state_dict(linear.state_dict())
    restore(fresh)
    assert sorted(fresh.state_dict()) == ["0.bias", "0.weight"]
