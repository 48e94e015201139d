"""Held-out batches go through the module's own steps to the model; random ones have the shape its config says."""

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from qlightning.export.inputs import held_out, random_inputs
from qlightning.export.trained import Trained
from qlightning.layers.convert import convert


class Rows(LightningDataModule):
    def __init__(self):
        super().__init__()
        self.ready = False

    def setup(self, stage):
        assert stage == "validate"
        self.ready = True

    def val_dataloader(self):
        assert self.ready
        return [[{"input_ids": torch.arange(i, i + 6).view(2, 3)} for i in range(5)]]


def test_validation_batches_reach_the_transformers_model(kit):
    inputs = held_out(Trained(kit.llama()), Rows(), batches=2)
    assert inputs.what == "2 validation batches of Rows"
    for i, call in enumerate(inputs.calls):
        assert call.args == ()
        assert torch.equal(call.kwargs.pop("input_ids"), torch.arange(i, i + 6).view(2, 3))
        assert call.kwargs == {"use_cache": False}


def test_batches_reach_a_module_of_one_s_own(kit):
    x = torch.randn(3, 32)
    inputs = held_out(Trained(kit.plain()), [(x, torch.zeros(3))])
    assert inputs.what == "1 held-out batches"
    assert torch.equal(inputs.calls[0].args[0], x)


def test_batches_reach_a_module_without_lightning():
    module = nn.Sequential(nn.Linear(16, 8)).eval()
    convert(module, "int4-g8")
    x = torch.randn(2, 16)
    assert torch.equal(held_out(Trained(module), [x]).calls[0].args[0], x)


class Bypassing(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(16, 8)

    def validation_step(self, batch, batch_idx):
        return self.net(batch)


def test_a_module_whose_forward_is_not_called_is_refused():
    module = Bypassing().eval()
    convert(module, "int4-g8")
    with pytest.raises(ValueError, match="Bypassing does not call its model through forward"):
        held_out(Trained(module), [torch.randn(2, 16)])
    with pytest.raises(ValueError, match=r"set self.example_input_array"):
        random_inputs(Trained(module))


def test_no_batches(kit):
    with pytest.raises(ValueError, match="data has no batches"):
        held_out(Trained(kit.plain()), [])


def test_random_tokens_are_a_function_of_the_seed(kit):
    trained = Trained(kit.llama())
    one, same, other = (random_inputs(trained, seed=seed).calls for seed in (0, 0, 1))
    ids = one[0].kwargs["input_ids"]
    assert ids.shape == (2, 32)
    assert int(ids.max()) < 48
    assert torch.equal(ids, same[0].kwargs["input_ids"])
    assert not torch.equal(ids, other[0].kwargs["input_ids"])
    assert not torch.equal(ids, one[1].kwargs["input_ids"])
    with torch.no_grad():
        trained.model(**one[0].kwargs)


def test_random_images():
    config = ViTConfig(image_size=8, patch_size=4, num_channels=1, hidden_size=16, intermediate_size=16,
                       num_hidden_layers=1, num_attention_heads=2)  # fmt: skip
    model = ViTForImageClassification(config).eval()
    convert(model, "int4-g16")
    (call, _) = random_inputs(Trained(model)).calls
    assert call.kwargs["pixel_values"].shape == (2, 1, 8, 8)
    model(**call.kwargs)


@pytest.mark.parametrize("kind", ["UNet2DModel", "DiTTransformer2DModel"])
def test_random_noise(kind):
    import diffusers

    configs = {
        "UNet2DModel": {
            **{"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": [8], "norm_num_groups": 4},
            **{"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "layers_per_block": 1},
        },
        "DiTTransformer2DModel": {
            **{"sample_size": 8, "in_channels": 1, "out_channels": 1, "patch_size": 4, "num_layers": 1},
            **{"num_attention_heads": 2, "attention_head_dim": 8, "num_embeds_ada_norm": 3},
        },
    }
    model = getattr(diffusers, kind)(**configs[kind]).eval()
    convert(model, {"type:Linear": "int4"}, min_coverage=0)
    call = random_inputs(Trained(model)).calls[0]
    assert call.args[0].shape == (2, 1, 8, 8)
    assert ("class_labels" in call.kwargs) == (kind == "DiTTransformer2DModel")
    with torch.no_grad():
        assert model(*call.args, **call.kwargs).sample.shape == (2, 1, 8, 8)


def test_the_example_of_a_module(kit):
    module = kit.plain()
    inputs = random_inputs(Trained(module))
    assert inputs.what == "the module's example_input_array"
    assert torch.equal(inputs.calls[0].args[0], module.example_input_array)
    module.example_input_array = {"x": torch.ones(1, 32)}
    assert torch.equal(random_inputs(Trained(module)).calls[0].kwargs["x"], torch.ones(1, 32))
