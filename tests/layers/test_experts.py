"""Fused experts against the plain model whose parameters were quantized by hand, expert by expert."""

import copy
import gc
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, NemotronHConfig, Qwen3MoeConfig

from qlightning.layers.convert import convert, restore
from qlightning.layers.coverage import count_multiply_adds
from qlightning.layers.experts import ExpertsTwin
from qlightning.layers.scheme import Scheme
from qlightning.layers.swap import convert_like
from qlightning.numerics.spec import parse

USUAL = {
    "vocab_size": 16,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
CONFIGS = {
    "mixtral": MixtralConfig(**USUAL, **MOE),
    "qwen3_moe": Qwen3MoeConfig(**USUAL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8),
    "gpt_oss": GptOssConfig(**USUAL, **MOE, layer_types=["full_attention"]),
}
IMPLEMENTATIONS = ["grouped_mm", "batched_mm", "eager"]
IDS = torch.arange(24).remainder(16).view(2, 12)


def mixture(name: str, implementation: str = "grouped_mm") -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.set_experts_implementation(implementation)
    return model


def experts_of(model: nn.Module) -> nn.Module:
    return model.model.layers[0].mlp.experts


def loss_of(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS, labels=IDS, use_cache=False).loss


@torch.no_grad()
def quantize_by_hand(experts: nn.Module, spec: str, *, transposed: bool) -> None:
    """Every output channel of every expert through a quantizer of its own, in loops."""
    for name in ("gate_up_proj", "down_proj"):
        for expert in getattr(experts, name):
            rows = expert.T if transposed else expert
            for channel in range(rows.shape[0]):
                rows[channel].copy_(parse(spec)(rows[channel][None])[0])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_and_gradients_are_those_of_parameters_quantized_by_hand(name, implementation):
    model, reference = mixture(name, implementation), mixture(name, implementation)
    convert(model, {"type:*Experts": "int4-g8"}, min_coverage=0)
    assert isinstance(experts_of(model), ExpertsTwin)
    quantize_by_hand(experts_of(reference), "int4-g8", transposed=name == "gpt_oss")

    ours, theirs = loss_of(model), loss_of(reference)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    ours.backward()
    theirs.backward()
    for (key, parameter), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-4, atol=1e-6, msg=key)
    assert experts_of(model).gate_up_proj.grad.abs().sum() > 0


def test_coverage_with_and_without_a_rule_for_experts():
    model = mixture("mixtral")
    only_linear = convert(model, {"*": "int4-g8", "type:*Experts": None})
    assert only_linear.weight_share < 0.25
    coverage = convert(restore(model), "int4-g8")
    assert coverage.weight_share > 0.8
    assert [row.quantizers for row in coverage.rows if row.name == "model.layers.0.mlp.experts"] == [
        {"gate_up_proj": "int4-g8", "down_proj": "int4-g8"}
    ]
    with torch.no_grad(), count_multiply_adds(model, coverage):
        model(IDS)
    counted = {row.kind: row.multiply_adds for row in coverage.rows if row.multiply_adds}
    assert counted["MixtralExperts"] == IDS.numel() * 2 * 3 * 16 * 24


class Saved:
    """Bytes that autograd saves for backward besides parameters and buffers, each storage once."""

    def __init__(self, model: nn.Module) -> None:
        known = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
        kept: dict[int, torch.Tensor] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in known:
                kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self.loss = loss_of(model)
        self.bytes = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("spec", ["int4-g8", "int4-channel-lsq"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_no_copy_of_a_weight_is_saved(name, implementation, spec):
    model = mixture(name, implementation)
    plain = Saved(model)
    convert(model, {"type:*Experts": spec}, min_coverage=0)
    quantized = Saved(model)
    assert quantized.bytes == plain.bytes
    quantized.loss.backward(retain_graph=True)
    first = experts_of(model).down_proj.grad.clone()
    quantized.loss.backward()
    torch.testing.assert_close(experts_of(model).down_proj.grad, 2 * first)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_copy_of_a_weight_stays_after_backward(implementation):
    model = mixture("mixtral", implementation)
    convert(model, "int4-g8")
    weight = experts_of(model).requires_grad_(False).down_proj

    def alike() -> set[int]:
        tensors = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.shape == weight.shape]
        return {t.data_ptr() for t in tensors} - {weight.data_ptr()}

    gc.collect()
    before, loss = alike(), loss_of(model)
    for _ in range(2):
        loss.backward(retain_graph=True)
        assert alike() <= before


def test_a_weight_changed_before_backward_is_an_error():
    model = mixture("mixtral")
    convert(model, "int4-g8")
    experts_of(model).requires_grad_(False)
    loss = loss_of(model)
    with torch.no_grad():
        experts_of(model).down_proj.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place between its forward and its backward"):
        loss.backward()


def test_activation_checkpointing_gives_the_same_gradients_and_still_saves():
    model = mixture("mixtral").train()
    convert(model, "int4-g8")
    without = Saved(model)
    without.loss.backward()
    expected = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad()
    model.activation_checkpointing_enable()
    with_it = Saved(model)
    assert with_it.bytes < without.bytes / 2
    with_it.loss.backward()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[key], msg=key)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_learned_scales_move_with_gradients_of_plain_autograd(name):
    model = mixture(name, "eager")
    convert(model, {"type:*Experts": "int4-channel-lsq"}, min_coverage=0)
    experts = experts_of(model)
    quantizer = copy.deepcopy(experts.down_proj_quantizer)
    assert tuple(quantizer.scale.value.shape) == (4 * 16, 1)
    loss_of(model).backward()

    experts.down_proj_quantizer.enabled = False
    with torch.no_grad():
        weight = experts.down_proj.clone()
        rows = weight.transpose(1, 2) if name == "gpt_oss" else weight
        quantized = quantizer(rows.reshape(-1, rows.shape[-1])).reshape(rows.shape)
        experts.down_proj.copy_(quantized.transpose(1, 2) if name == "gpt_oss" else quantized)
    got = experts.down_proj_quantizer.scale.value.grad.clone()
    model.zero_grad()
    loss_of(model).backward()
    assert not experts.down_proj_quantizer.scale.value.grad.any()  # bypassed: in the graph, at rest
    grad = experts.down_proj.grad
    grad = grad.transpose(1, 2) if name == "gpt_oss" else grad
    quantizer(rows.reshape(-1, rows.shape[-1])).backward(grad.reshape(-1, rows.shape[-1]))
    torch.testing.assert_close(got, quantizer.scale.value.grad, rtol=1e-4, atol=1e-7)
    assert got.abs().sum() > 0


def test_the_input_is_quantized():
    model, reference = mixture("mixtral"), mixture("mixtral")
    convert(model, {"type:MixtralExperts": Scheme(input="int4-token")}, min_coverage=0)
    quantizer = parse("int4-token")
    experts_of(reference).register_forward_pre_hook(lambda module, inputs: (quantizer(inputs[0]), *inputs[1:]))
    assert torch.equal(loss_of(model), loss_of(reference))


def test_autocast_and_bfloat16():
    model = mixture("mixtral")
    convert(model, "int4-g8")
    exact = loss_of(model)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = loss_of(model)
    mixed.backward()
    torch.testing.assert_close(mixed, exact, rtol=0.02, atol=0.02)
    assert experts_of(model).down_proj.grad.dtype == torch.float32
    half = mixture("mixtral").to(torch.bfloat16)
    convert(half, "int4-g8")
    loss_of(half).backward()
    assert experts_of(half).down_proj.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_state_dict_restore_copies_and_pickles(name):
    model = mixture(name)
    plain, keys = loss_of(model).detach(), set(model.state_dict())
    parameters = dict(experts_of(model).named_parameters())
    convert(model, "int4-channel-lsq")
    expected = loss_of(model).detach()
    assert expected != plain
    assert keys < set(model.state_dict())
    assert all(dict(experts_of(model).named_parameters())[key] is p for key, p in parameters.items())
    loaded = mixture(name)
    convert_like(loaded, model.state_dict())
    loaded.load_state_dict(model.state_dict())
    for copied in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(loss_of(copied), expected)
    assert torch.equal(loss_of(restore(model)), plain)
    assert set(model.state_dict()) == keys
    assert "down_proj" not in experts_of(model).__dict__


def test_experts_without_a_gate():
    torch.manual_seed(0)
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

    config = NemotronHConfig(hidden_size=8, n_routed_experts=3, moe_intermediate_size=12)
    experts = NemotronHExperts(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    reference = copy.deepcopy(experts)
    convert(nn.ModuleList([experts]), "int4-g4")
    assert set(dict(experts.quantizers())) == {"up_proj", "down_proj"}
    with torch.no_grad():
        for name in ("up_proj", "down_proj"):
            for expert in getattr(reference, name):
                expert.copy_(parse("int4-g4")(expert))
    x, index = torch.randn(5, 8), torch.tensor([[0, 1], [1, 2], [2, 0], [0, 2], [1, 0]])
    torch.testing.assert_close(experts(x, index, torch.ones(5, 2)), reference(x, index, torch.ones(5, 2)))


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Parameter(torch.ones(2, 4, 8)), nn.Parameter(torch.ones(2, 8, 4))


def test_an_unknown_layout_is_left_alone_or_refused():
    model = nn.Sequential(Unknown(), nn.Linear(8, 64))
    coverage = convert(model, "int4-g8")
    assert "cannot be told" in next(row.reason for row in coverage.rows if row.kind == "Unknown")
    with pytest.raises(ValueError, match=r"Unknown keeps \(experts, out, in\) or \(experts, in, out\) cannot be told"):
        convert(restore(model), {"*": "int4-g8", "type:Unknown": "int8"})


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft, of transformers
def test_a_weight_that_was_parametrized_after_conversion_is_an_error():
    model = get_peft_model(mixture("mixtral"), LoraConfig(r=2, target_parameters=["experts.down_proj"]))
    convert(model, "int4-g8")
    with pytest.raises(ValueError, match=r"down_proj of MixtralExperts was parametrized.*'type:MixtralExperts': None"):
        model(IDS)
    with model.disable_adapter():
        assert model(IDS).logits.isfinite().all()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_no_graph_break_under_torch_compile():
    model = mixture("mixtral").model.layers[0].mlp
    convert(model, "int4-g8")
    x = torch.randn(1, 6, 16)
    assert torch.equal(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))
