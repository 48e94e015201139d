"""Blocks, their order and what flows through them, in models of every kind."""

import contextlib
import functools

import pytest
import torch
from torch import nn

from qlightning.capture import (
    Stream,
    device_of,
    fetched,
    find_blocks,
    run_batch,
    run_step,
    sites_of,
    stop_forward,
    stored,
    trace,
)
from qlightning.layers.convert import convert


def llama(**options):
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    return AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_attention_heads=2, **options)).eval()


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return ViTForImageClassification(ViTConfig(**sizes, num_attention_heads=2)).eval()


def unet():
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    ).eval()


def dit():
    from diffusers import DiTTransformer2DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 1, "num_layers": 2, "sample_size": 8}
    return DiTTransformer2DModel(**sizes, patch_size=2, num_embeds_ada_norm=10, norm_num_groups=1).eval()


def convnet():
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.ReLU(inplace=True), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(64, 2))


class Between(nn.Module):
    """Computes between its blocks, and skips one."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        a = self.first(x)
        b = self.second(a.relu() + 1)
        return self.third(b.add_(a))


MODELS = {
    "llama": (
        llama,
        lambda i: {"input_ids": torch.arange(10).view(2, 5) + i, "attention_mask": torch.ones(2, 5).tril(2)},
    ),
    "vit": (vit, lambda i: {"pixel_values": torch.randn(2, 3, 8, 8)}),
    "unet": (unet, lambda i: {"sample": torch.randn(2, 1, 8, 8), "timestep": torch.tensor([3, 500 + i])}),
    "dit": (
        dit,
        lambda i: {
            "hidden_states": torch.randn(2, 1, 8, 8),
            "timestep": torch.tensor([3, 5 + i]),
            "class_labels": torch.tensor([1, 2]),
        },
    ),
    "convnet": (convnet, lambda i: torch.randn(2, 3, 8, 8)),
    "between": (Between, lambda i: torch.randn(2, 4)),
}


@pytest.fixture(params=MODELS)
def case(request):
    make, batch = MODELS[request.param]
    torch.manual_seed(1)
    model = make()
    for p in model.parameters():  # diffusers starts some layers at zero
        p.data += 0.05 * torch.randn_like(p)
    convert(model, "int4")
    for site in sites_of(model):
        site.quantizer.enabled = False
    return request.param, model, [batch(i) for i in range(2)]


def stream_of(model, data, blocks, forward=run_step):
    flow = trace(lambda: run_batch(model, data[0], forward, 0), blocks)
    return Stream(model, blocks, flow, batches=data, forward=forward)


@torch.no_grad()
def walk(model, data, blocks):
    """Every block on its captured inputs; what each returned, by batch."""
    stream, returned = stream_of(model, data, blocks), [{} for _ in data]
    for place, name in enumerate(stream.flow.order):
        for i, (args, kwargs) in enumerate(stream.inputs(name)):
            args, kwargs = fetched((args, kwargs), device_of(model))
            output = blocks[name](*args, **kwargs)
            returned[i][name] = stored(output)
            stream.keep(name, i, output)
        stream.forget(place + 1)
    return stream, returned


def leaves(tree):
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@torch.no_grad()
def test_replayed_blocks_are_those_of_the_forward_pass(case):
    name, model, data = case
    if name == "llama":
        model.config.use_cache = False
    blocks = find_blocks(model)
    assert {id(s.quantizer) for s in sites_of(model)} == {id(s.quantizer) for b in blocks.values() for s in sites_of(b)}
    _, returned = walk(model, data, blocks)
    for batch, ours in zip(data, returned, strict=True):
        plain = {}
        hooks = [
            block.register_forward_hook(lambda m, a, out, key=key, plain=plain: plain.__setitem__(key, stored(out)))
            for key, block in blocks.items()
        ]
        run_batch(model, batch, run_step, 0)
        for hook in hooks:
            hook.remove()
        assert list(plain) == list(ours)
        for key in plain:
            assert all(torch.equal(a, b) for a, b in zip(leaves(plain[key]), leaves(ours[key]), strict=True)), key


def test_the_blocks_of_each_architecture(case):
    name, model, _ = case
    found = list(find_blocks(model))
    expected = {
        "llama": [f"model.layers.{i}" for i in range(3)],
        "convnet": ["0", "2", "5"],
        "between": ["first", "second", "third"],
    }
    if name in expected:
        assert found == expected[name]
    elif name == "vit":
        assert sum(".layer" in n for n in found) == 2
        assert any("patch" in n for n in found)
    elif name == "unet":
        assert {"down_blocks.0", "down_blocks.1", "up_blocks.0", "up_blocks.1", "conv_in", "conv_out"} <= set(found)
        assert any(n.startswith("mid_block.") for n in found)
    else:
        assert {"transformer_blocks.0", "transformer_blocks.1"} <= set(found)


@torch.no_grad()
def test_outputs_are_freed_when_nobody_reads_them():
    model = llama()
    convert(model, "int4")
    model.config.use_cache = False
    data = [MODELS["llama"][1](0)]
    stream, _ = walk(model, data, find_blocks(model))
    assert stream.flow.last_use == {"model.layers.0": 1, "model.layers.1": 2, "model.layers.2": 0}
    assert not any(isinstance(leaf, torch.Tensor) for leaf in stream.returned[0].values())
    between = Between()
    convert(between, "int4")
    stream, _ = walk(between, [torch.randn(2, 4)], find_blocks(between))
    assert stream.flow.last_use == {"first": 2, "second": 2, "third": 0}


@torch.no_grad()
def test_skip_connections_are_kept_until_they_are_read():
    model = unet()
    convert(model, "int4")
    batch = MODELS["unet"][1](0)
    flow = trace(lambda: run_batch(model, batch, run_step, 0), find_blocks(model))
    place = {name: i for i, name in enumerate(flow.order)}
    assert flow.last_use["down_blocks.0"] == flow.last_use["conv_in"] == place["up_blocks.1"]
    assert flow.last_use["down_blocks.1"] == place["up_blocks.0"]
    assert flow.last_use["mid_block.resnets.1"] == place["up_blocks.0"]
    assert flow.last_use["up_blocks.1"] == place["conv_out"]
    assert flow.last_use["time_embedding.linear_1"] == place["time_embedding.linear_2"]
    assert flow.last_use["time_embedding.linear_2"] == place["up_blocks.1"]


class Joined(nn.Module):
    """Hands on what `join` makes of two outputs."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        a = self.first(x)
        b = self.second(a)
        return self.third(self.join(a, b))


@torch.no_grad()
def test_what_is_computed_outside_of_autograd_keeps_everything_or_is_refused():
    model = Joined()
    convert(model, "int4")
    model.join = lambda a, b: a.detach() + b
    with pytest.raises(ValueError, match=r"'third' is given NaN.*name larger blocks"):
        walk(model, [torch.randn(2, 4)], find_blocks(model))
    model.join = torch.add
    model.forward = torch.no_grad()(model.forward)
    stream, _ = walk(model, [torch.randn(2, 4)], find_blocks(model))
    assert set(stream.flow.last_use.values()) == {3}


@torch.no_grad()
def test_equal_tensors_are_stored_once():
    model = llama()
    convert(model, "int4")
    model.config.use_cache = False
    data = [MODELS["llama"][1](i) for i in range(2)]
    blocks = find_blocks(model)
    first, second = stream_of(model, data, blocks).inputs("model.layers.0")
    assert first[1]["position_embeddings"][0] is second[1]["position_embeddings"][0]
    assert first[0][0] is not second[0][0]
    tree = stored(({"q": (x := torch.ones(2))}, x))
    again = fetched(tree, torch.device("cpu"))
    assert again[0]["q"] is again[1] is not x


@torch.no_grad()
def test_values_that_nobody_should_read_are_nan():
    stream = Stream(nn.Identity(), {}, trace_of("a"), batches=[None], forward=run_step)
    stream.keep("a", 0, (torch.ones(2), torch.ones(1, dtype=torch.long)))
    stream.forget(1)
    floats, integers = fetched(stream.returned[0]["a"], torch.device("cpu"))
    assert floats.isnan().all()
    assert integers.tolist() == [1]  # integers cannot say that they are missing


def trace_of(name):
    from qlightning.capture import Flow

    return Flow([name], {name: 0})


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, times=2):
        for _ in range(times):
            x = self.layer(x)
        return self.other(x)


@torch.no_grad()
def test_blocks_run_once():
    model = Twice()
    convert(model, "int4")
    blocks, data = find_blocks(model), [torch.randn(2, 4)]
    with pytest.raises(ValueError, match="'layer' runs more than once"):
        stream_of(model, data, blocks)
    stream_of(model, data, blocks, forward=lambda m, x: m(x, times=1))
    with pytest.raises(ValueError, match="other did not run"):
        stream_of(model, data, blocks, forward=lambda m, x: m.layer(x))
    turns = iter([1, 2])
    stream = stream_of(model, data, blocks, forward=lambda m, x: m(x, times=next(turns)))
    stream.keep("layer", 0, data[0])
    with pytest.raises(ValueError, match="'layer' runs more than once"):
        stream.inputs("other")
    stream.forward = lambda m, x: m.layer(x)
    with pytest.raises(ValueError, match="does not run block 'other'"):
        stream.inputs("other")


@torch.no_grad()
def test_a_cache_among_the_arguments_is_refused():
    model = llama()
    convert(model, "int4")
    blocks, data = find_blocks(model), [MODELS["llama"][1](0)]
    with pytest.raises(ValueError, match=r"DynamicCache.*use_cache=False"):
        stream_of(model, data, blocks, forward=lambda m, b: m(**b, use_cache=True)).inputs("model.layers.0")


@torch.no_grad()
def test_a_forward_on_the_instance_comes_back():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    convert(model, "int4")

    def own(x):
        return type(model[0]).forward(model[0], x)

    model[0].forward = own
    stream = stream_of(model, [torch.randn(2, 4)], find_blocks(model))
    stream.keep("0", 0, torch.ones(2, 4))
    assert torch.equal(stream.inputs("1")[0][0][0], torch.ones(2, 4))
    assert model[0].forward is own


def test_blocks_by_name():
    model = llama()
    convert(model, "int4")
    assert list(find_blocks(model, ["model.layers.[12]"])) == ["model.layers.1", "model.layers.2"]
    with pytest.raises(ValueError, match="matches no module"):
        find_blocks(model, ["layers.*"])
    assert list(find_blocks(model, ["model.layers.*"])) == [f"model.layers.{i}" for i in range(3)]
    with pytest.raises(ValueError, match=r"qlightning\.convert"):
        find_blocks(llama())


def test_no_except_of_a_model_holds_a_stop_up():
    class Careful(nn.Module):
        def forward(self, x):
            with contextlib.suppress(Exception):
                stop_forward()

    from qlightning.capture import call_until_stopped

    assert call_until_stopped(lambda: Careful()(None))
    assert not call_until_stopped(lambda: None)


def test_how_batches_are_passed():
    class Module(nn.Module):
        def forward(self, *args, **kwargs):
            return args, kwargs

    class Steps(nn.Module):
        def training_step(self, batch, batch_idx):
            return batch, batch_idx

    wrapped = Steps()
    plain = wrapped.training_step
    wrapped.training_step = functools.wraps(plain)(lambda *args, **kwargs: plain(*args, **kwargs))
    assert run_step(wrapped, "batch") == ("batch", 0)

    assert run_step(Module(), {"a": 1}) == ((), {"a": 1})
    assert run_step(Module(), [1, 2]) == ((1, 2), {})
    assert run_step(Module(), 1) == ((1,), {})
    assert run_step(Steps(), "batch") == ("batch", 0)


@torch.no_grad()
def test_what_works_in_place_does_not_work_on_what_is_kept():
    model = Between()
    convert(model, "int4")
    blocks, data = find_blocks(model), [torch.randn(2, 4)]
    stream = stream_of(model, data, blocks)
    for name in ("first", "second"):
        args, _ = fetched(stream.inputs(name)[0], torch.device("cpu"))
        stream.keep(name, 0, blocks[name](*args))
    once, twice = (stream.inputs("third")[0][0][0] for _ in range(2))  # it adds to the second's output in place
    assert torch.equal(once, twice)
