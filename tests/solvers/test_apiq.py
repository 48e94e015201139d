"""ApiQ with PEFT's LoRA layers as users have them, and without any."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from qlightning.capture import find_blocks, sites_of
from qlightning.layers.convert import convert
from qlightning.solvers import ApiQ, calibrate
from qlightning.solvers.clipping import SigmoidClip
from qlightning.solvers.fixed import Fixed, fix_scales
from qlightning.solvers.solver import BlockTask

SPEC = "int2-g8-asym"
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft, of transformers


def lora(small, spec=SPEC):
    base = small.llama(None)
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    convert(model, spec)
    return model


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "extra_state" not in name}


def errors(report):
    return [block.error for block in report.blocks]


@pytest.mark.parametrize("level", ["block", "layer"])
def test_only_ranges_and_adapters_change_and_blocks_come_closer(small, level):
    still, model = lora(small), lora(small)
    assert list(find_blocks(model)) == [f"base_model.model.model.layers.{i}" for i in range(2)]
    start = calibrate(still, small.tokens(), ApiQ(epochs=0, level=level))
    before, trainable = state(model), {name: p.requires_grad for name, p in model.named_parameters()}
    report = calibrate(model, small.tokens(), ApiQ(epochs=6, adapter_lr=1e-2, clip_lr=5e-2, level=level))
    after = state(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    assert all(any(f"layers.{i}.{p}.lora_B" in n for n in changed) for i in range(2) for p in ("mlp.down_proj",))
    assert {name: p.requires_grad for name, p in model.named_parameters() if name in trainable} == trainable
    assert all(isinstance(site.quantizer.scale, Fixed) for site in sites_of(model))
    assert not any(isinstance(m, SigmoidClip) for m in model.modules())
    for ours, plain in zip(errors(report), errors(start), strict=True):
        assert ours < 0.9 * plain
    assert all(row.changed > 0 for row in report.sites)


def test_without_training_it_is_min_max_at_the_initial_clip(small):
    model = lora(small)
    weights = {site.name: site.weight.clone() for site in sites_of(model)}
    calibrate(model, small.tokens(), ApiQ(epochs=0))
    for site in sites_of(model):
        blocks = weights[site.name].view(-1, 8)
        clip = float(torch.sigmoid(torch.tensor(4.0)))
        high, low = clip * blocks.amax(1).clamp(min=0), clip * blocks.amin(1).clamp(max=0)
        scale = (high - low) / 3
        zero = torch.round(-low / scale)
        codes = (torch.round(blocks / scale[:, None]) + zero[:, None]).clamp(0, 3)
        wanted = ((codes - zero[:, None]) * scale[:, None]).view_as(site.weight)
        torch.testing.assert_close(site.quantizer(site.weight).detach(), wanted)
        assert torch.equal(site.weight, weights[site.name])
    assert all(not p.any() for name, p in model.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("spec", ["int3-g8", "int2-g8-asym-learned", "int3-lsq"])
def test_ranges_alone_learn_where_there_are_no_adapters(small, spec):
    model = small.llama(spec)
    weights = {site.name: site.weight.clone() for site in sites_of(model)}
    start = errors(calibrate(small.llama(spec), small.tokens(), ApiQ(epochs=0)))
    ours = errors(calibrate(model, small.tokens(), ApiQ(epochs=4, clip_lr=1e-1)))
    assert ours[0] < start[0]
    for site in sites_of(model):
        assert torch.equal(site.weight, weights[site.name])
        values = site.quantizer(site.weight).detach()
        stored = site.quantizer.dequantize(site.quantizer.quantize(site.weight), torch.float32)
        assert torch.equal(values, stored)


@pytest.mark.parametrize("level", ["block", "layer"])
def test_block_0_has_one_input_and_later_blocks_two(small, level):
    """X_q of a block is what the quantized blocks before it return, and there are none before the first."""
    tasks = []

    class Watched(ApiQ):
        def solve(self, task, *, generator):
            tasks.append(task)
            super().solve(task, generator=generator)

    calibrate(lora(small), small.tokens(), Watched(epochs=1, level=level))
    same = [
        [torch.equal(q[0][0], fp[0][0]) for q, fp in zip(task.inputs["q"], task.inputs["fp"], strict=True)]
        for task in tasks
    ]
    assert same == [[True] * 3, [False] * 3]


def test_stored_codes_times_steps_are_the_quantized_weight(small):
    model = lora(small)
    calibrate(model, small.tokens(), ApiQ(epochs=2, clip_lr=5e-2))
    for site in sites_of(model):
        stored = site.quantizer.quantize(site.weight)
        codes, scale, zero, _ = stored
        by_hand = (codes.float().unflatten(1, (-1, 8)) - zero.view(len(codes), -1, 1)) * scale.view(len(codes), -1, 1)
        assert torch.equal(by_hand.flatten(1), site.quantizer(site.weight).detach())
        assert torch.equal(site.quantizer.dequantize(stored, torch.float32), site.quantizer(site.weight).detach())


def test_both_targets(small):
    one, both = (lora(small) for _ in range(2))
    calibrate(one, small.tokens(), ApiQ(epochs=2))
    calibrate(both, small.tokens(), ApiQ(epochs=2, target="both"))
    first = "base_model.model.model.layers.0.mlp.down_proj.lora_A.default.weight"
    second = first.replace("layers.0", "layers.1")
    # In the first block both streams are one: the loss is twice as large, which Adam hardly sees. Not so in the next.
    torch.testing.assert_close(one.state_dict()[first], both.state_dict()[first], atol=1e-4, rtol=1e-3)
    assert not torch.allclose(one.state_dict()[second], both.state_dict()[second], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("level", ["block", "layer"])
def test_it_trains_on_the_quantized_stream_towards_the_float_one(level):
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    convert(block, "int2-asym")
    fix_scales(block)
    for site in sites_of(block):
        site.quantizer.enabled = False
    streams = {name: [torch.randn(16, 8) for _ in range(2)] for name in ("fp", "q")}
    groups = [[site] for site in sites_of(block)]
    targets = {"fp": [block(x).detach() for x in streams["fp"]]}
    seen = []
    block[0].register_forward_pre_hook(lambda m, args: seen.append((torch.is_grad_enabled(), args[0])))
    block.requires_grad_(False)
    calls = {name: [((x,), {}) for x in xs] for name, xs in streams.items()}
    task = BlockTask(block, groups, calls, targets)
    with torch.enable_grad():
        ApiQ(level=level, epochs=2).solve(task, generator=torch.Generator())
    trained = [x for grad, x in seen if grad]
    assert len(trained) == 4
    assert all(any(torch.equal(x, q) for q in streams["q"]) for x in trained)
    observed = [x for grad, x in seen if not grad]
    assert any(torch.equal(x, streams["fp"][0]) for x in observed) == (level == "layer")


@pytest.mark.parametrize("level", ["block", "layer"])
def test_resume(small, level):
    whole, states = lora(small), []
    solver = ApiQ(epochs=1, level=level)
    calibrate(whole, small.tokens(), solver, on_block=states.append)
    again = lora(small)
    calibrate(again, small.tokens(), solver, state=states[0])
    for name, tensor in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize("arguments", [{"level": "model"}, {"level": "layer", "target": "both"}, {"epochs": -1}])
def test_wrong_arguments(arguments):
    with pytest.raises(ValueError, match=r"ApiQ\("):
        ApiQ(**arguments)
