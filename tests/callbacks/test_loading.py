"""A converted checkpoint loads wherever its LightningModule does, and gives the trained, quantized outputs."""

import pytest
import torch
from torch import nn

from qlightning import QATCallback, convert
from qlightning.layers.convert import quantizers_of, restore
from qlightning.layers.layer import Twin

# Lightning warns of every callback with state that a checkpoint knows and the Trainer does not: here it is the point.
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create")

W4A8 = {"weight": "int4-lsq", "input": "int8-tensor-lsq", "start": 2, "calibration": 2}
SCHEMES = {
    "learned": W4A8,
    "dynamic": {"weight": "nvfp4", "input": "int8-token", "rules": {"net.0": "int3"}},
    "followed": {"weight": "int4-g8-sr", "input": "int8-tensor-ema", "calibration": 2, "output": "fp8e4m3-token"},
}


def trained(kit, module, scheme, **options):
    """The path of the last checkpoint and the trained module's outputs."""
    save = kit.every_step(kit.folder / "run")
    for name, value in options.items():
        setattr(save, name, value)
    kit.fit(module, QATCallback(**scheme), save, max_steps=5)
    return kit.folder / "run" / "step=5.ckpt", kit.outputs(module)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("place", ["Net", "LazyNet", "EarlyNet"])
def test_load_from_checkpoint(kit, place, scheme):
    cls = getattr(kit, place)
    path, outputs = trained(kit, cls(), SCHEMES[scheme])
    assert not torch.equal(outputs, kit.outputs(restore(cls.load_from_checkpoint(path))))
    for options in ({}, {"weights_only": True}, {"weights_only": False}, {"strict": False}):
        module = cls.load_from_checkpoint(path, **options)
        assert type(module) is cls
        assert torch.equal(kit.outputs(module), outputs)


@pytest.mark.parametrize("place", ["Net", "SetupNet", "LazyNet", "EarlyNet"])
def test_trainer_without_the_callback(kit, place):
    cls = getattr(kit, place)
    path, outputs = trained(kit, cls(), W4A8)
    predicted = kit.trainer().predict(cls(), kit.held_out(), ckpt_path=path)
    assert torch.equal(torch.cat(predicted), outputs)
    y = kit.rows(10, seed=8).tensors[1]
    loss = float((outputs - y).square().mean())
    (validated,) = kit.trainer().validate(cls(), kit.held_out(), ckpt_path=path, verbose=False)
    (tested,) = kit.trainer().test(cls(), kit.held_out(), ckpt_path=path, verbose=False)
    assert validated["val_loss"] == pytest.approx(loss, rel=1e-5)
    assert tested["test_loss"] == validated["val_loss"]


def test_trainer_with_the_callback(kit):
    path, outputs = trained(kit, kit.Net(), W4A8)
    predicted = kit.trainer(QATCallback(**W4A8)).predict(kit.Net(), kit.held_out(), ckpt_path=path)
    assert torch.equal(torch.cat(predicted), outputs)


def test_best_checkpoint_of_the_same_trainer(kit):
    module = kit.Net()
    save = kit.every_step(kit.folder / "run")
    trainer = kit.fit(module, QATCallback(**W4A8), save, max_steps=5)
    outputs = kit.outputs(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    predicted = trainer.predict(module, kit.held_out(), ckpt_path=kit.folder / "run" / "step=5.ckpt")
    assert torch.equal(torch.cat(predicted), outputs)


def test_checkpoints_before_the_switch_are_float(kit):
    path, _ = trained(kit, kit.Net(), W4A8)
    module = kit.Net.load_from_checkpoint(path.with_name("step=1.ckpt"))
    outputs = kit.outputs(module)
    assert torch.equal(outputs, kit.outputs(restore(module)))


def test_a_module_with_an_on_load_checkpoint_of_its_own(kit):
    class Renamed(kit.Net):
        def on_save_checkpoint(self, checkpoint):
            checkpoint["state_dict"] = {f"old.{name}": value for name, value in checkpoint["state_dict"].items()}

        def on_load_checkpoint(self, checkpoint):
            renamed = {name.removeprefix("old."): value for name, value in checkpoint["state_dict"].items()}
            checkpoint["state_dict"] = renamed

    path, outputs = trained(kit, Renamed(), W4A8)
    assert torch.equal(kit.outputs(Renamed.load_from_checkpoint(path)), outputs)
    predicted = kit.trainer().predict(Renamed(), kit.held_out(), ckpt_path=path)
    assert torch.equal(torch.cat(predicted), outputs)


def test_a_module_with_a_load_state_dict_of_its_own(kit):
    class Counting(kit.Net):
        loaded = 0

        def load_state_dict(self, state_dict, *args, **kwargs):
            self.loaded += 1
            return super().load_state_dict(state_dict, *args, **kwargs)

    path, outputs = trained(kit, Counting(), W4A8)
    module = Counting.load_from_checkpoint(path)
    assert module.loaded == 1
    assert torch.equal(kit.outputs(module), outputs)


def test_a_module_with_hyperparameters(kit):
    class Sized(kit.Net):
        def __init__(self, width, **kwargs):
            super().__init__(**kwargs)
            self.save_hyperparameters()
            self.net[4] = nn.Linear(16, width, bias=False)
            nn.init.constant_(self.net[4].weight, 0.1)

        def loss(self, batch):
            return self(batch[0]).square().mean()

    path, outputs = trained(kit, Sized(width=6, dropout=0.2), W4A8)
    module = Sized.load_from_checkpoint(path)
    assert module.hparams.width == 6
    assert torch.equal(kit.outputs(module), outputs)


def test_checkpoints_of_weights_only(kit):
    path, outputs = trained(kit, kit.Net(), W4A8, save_weights_only=True)
    assert "callbacks" not in torch.load(path)
    assert torch.equal(kit.outputs(kit.Net.load_from_checkpoint(path)), outputs)
    assert torch.equal(torch.cat(kit.trainer().predict(kit.Net(), kit.held_out(), ckpt_path=path)), outputs)


def test_training_goes_on_from_a_loaded_module(kit):
    """A new run that is given the quantized module keeps its scales, as it keeps its weights."""
    path, _ = trained(kit, kit.Net(), W4A8)
    module = kit.Net.load_from_checkpoint(path)
    scales = kit.scales(module)
    starts = kit.Record(look=lambda trainer, module: kit.scales(module))
    kit.fit(module, QATCallback(**{**W4A8, "start": 0}), starts, max_steps=3)
    assert all(torch.equal(value, scales[name]) for name, value in starts.seen[0].items())


# --- a float checkpoint into a converted module ---


def test_a_float_checkpoint_settles_the_weights_scales(kit):
    """Round-to-nearest of the loaded weights, not of the ones that were there at conversion."""
    save = kit.every_step(kit.folder / "float")
    source = kit.Net()
    kit.fit(source, save, max_steps=6)
    state = torch.load(kit.folder / "float" / "step=6.ckpt")["state_dict"]
    for spec in ("int4-lsq", "int4-g8", "int4-asym-learned", "int4-ema"):
        module, rounded = kit.Net(), kit.Net()
        rounded.load_state_dict(state)
        convert(rounded, spec)
        convert(module, spec)
        assert module.load_state_dict(state, strict=True) == ([], [])
        assert torch.equal(kit.outputs(module), kit.outputs(rounded)), spec


def test_a_pretrained_model_loaded_in_setup(kit):
    """The user's own `load_state_dict` between our conversions, as with weights that `setup` fetches."""
    source = kit.make_layers(seed=9).state_dict()

    class Pretrained(kit.Net):
        def setup(self, stage):
            self.net.load_state_dict(source)

    module, plain = Pretrained(), kit.Net()
    plain.net.load_state_dict(source)
    first, alone = kit.Record(), kit.Record()
    kit.fit(module, QATCallback("int4-lsq"), first, max_steps=3)
    kit.fit(plain, QATCallback("int4-lsq"), alone, max_steps=3)
    assert first.losses == alone.losses


# --- what cannot be loaded ---


def test_a_checkpoint_of_another_scheme(kit):
    path, _ = trained(kit, kit.Net(), W4A8)
    wanted = (
        r"quantizes 'net\.0' as QATCallback\(weight='int4-lsq', input='int8-tensor-lsq'\) does, but it is converted "
        r"already, with weight 'int3-g8'; call qlightning\.restore\(module\)"
    )
    with pytest.raises(ValueError, match=wanted):
        kit.trainer(QATCallback("int3-g8")).predict(kit.Net(), kit.held_out(), ckpt_path=path)
    module = kit.Net()
    convert(module, "int3-g8")
    outputs = kit.outputs(module)
    with pytest.raises(ValueError, match=wanted):
        module.load_state_dict(torch.load(path)["state_dict"])
    assert torch.equal(kit.outputs(module), outputs)


def test_a_checkpoint_that_leaves_a_layer_in_float(kit):
    """More layers than the checkpoint's must not be quantized behind its back."""
    path, _ = trained(kit, kit.Net(), {**W4A8, "rules": {"net.4": None}})
    wanted = r"holds 'net\.4' in float, but it is converted here, with weight 'int4-lsq', .*rules=\{'net\.4': None\}"
    with pytest.raises(ValueError, match=wanted):
        kit.trainer(QATCallback(**W4A8)).predict(kit.Net(), kit.held_out(), ckpt_path=path)
    module = kit.Net.load_from_checkpoint(path)
    kit.fit(module, QATCallback(**{**W4A8, "start": 0}), max_steps=3)  # more layers, in a new run
    assert len(list(quantizers_of(module))) == 6


def test_a_resume_with_another_scheme(kit):
    path, _ = trained(kit, kit.Net(), W4A8)
    save = kit.every_step(kit.folder / "run")
    with pytest.raises(ValueError, match=r"'net\.0' as QATCallback\(.*'int8-tensor-lsq'\) .*'int8-token'"):
        kit.fit(kit.Net(), QATCallback("int4-lsq", input="int8-token"), save, ckpt_path=path)


def test_a_checkpoint_of_another_model(kit):
    path, _ = trained(kit, kit.Net(), W4A8)

    class Shallow(kit.Net):
        def __init__(self):
            super().__init__()
            del self.net[4]

    module = Shallow()
    with pytest.raises(ValueError, match=r"quantizes 'net\.4', which Shallow does not have"):
        module.load_state_dict(torch.load(path)["state_dict"])
    assert not any(isinstance(layer, Twin) for layer in module.modules())

    class Other(kit.Net):
        def __init__(self):
            super().__init__()
            self.net[2] = nn.PReLU(16)

    module = Other()
    with pytest.raises(ValueError, match=r"quantizes 'net\.2', which is a PReLU here"):
        module.load_state_dict(torch.load(path)["state_dict"])
    assert not any(isinstance(layer, Twin) for layer in module.modules())


@pytest.mark.parametrize("kept", [0.3, 0.9])
def test_a_truncated_file(kit, kept):
    path, _ = trained(kit, kit.Net(), W4A8)
    data = path.read_bytes()
    cut = path.with_name("cut.ckpt")
    cut.write_bytes(data[: int(len(data) * kept)])
    module = kit.Net()
    outputs = kit.outputs(module)
    with pytest.raises((OSError, RuntimeError)):
        kit.Net.load_from_checkpoint(cut)
    with pytest.raises((OSError, RuntimeError)):
        kit.trainer().predict(module, kit.held_out(), ckpt_path=cut)
    with pytest.raises(ValueError, match=f"{cut} is no whole checkpoint .* resume from another one"):
        kit.fit(module, QATCallback(**W4A8), kit.every_step(kit.folder / "run"), ckpt_path=cut)
    assert not any(isinstance(layer, Twin) for layer in module.modules())
    assert torch.equal(kit.outputs(module), outputs)


def test_a_checkpoint_with_missing_tensors(kit):
    path, _ = trained(kit, kit.Net(), W4A8)
    state = torch.load(path)["state_dict"]
    del state["net.2.weight_quantizer.scale.value"], state["net.4.weight"]
    module = kit.Net()
    with pytest.raises(RuntimeError, match=r'(?s)net\.2\.weight_quantizer\.scale\.value.*net\.4\.weight"'):
        module.load_state_dict(state)
    assert not any(isinstance(layer, Twin) for layer in module.modules())


def test_float_checkpoints_and_models_are_none_of_our_business(kit):
    module, source = kit.Net(), kit.Net()
    source.net = kit.make_layers(seed=4)
    assert module.load_state_dict(source.state_dict()) == ([], [])
    assert torch.equal(kit.outputs(module), kit.outputs(source))
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"extra"'):
        module.load_state_dict({**source.state_dict(), "extra": torch.zeros(1)})
    assert not list(quantizers_of(module))
