"""Averaged copies of the module are in its phase, and their checkpoints predict quantized."""

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging

from qlightning import QATCallback
from qlightning.layers.convert import quantizers_of

W4A8 = {"weight": "int4-lsq", "input": "int8-tensor-lsq", "start": 4, "calibration": 2, "freeze_scales": 8}
AVERAGES = {
    "ema": lambda: EMAWeightAveraging(decay=0.8),
    "ema-without-buffers": lambda: EMAWeightAveraging(decay=0.8, use_buffers=False),
}


def run(kit, average, *, resume=None, cls=None, **options):
    torch.manual_seed(1 if resume is None else 2)
    record, module = kit.Record(), (cls or kit.Net)()
    save = kit.every_step(kit.folder / "run", keep=-1 if resume is None else 0)
    callbacks = QATCallback(**W4A8), average(), record, save
    kit.fit(module, *callbacks, ckpt_path=resume, **{"max_steps": 11, **options})
    return record.losses, module


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create")
@pytest.mark.parametrize("average", AVERAGES)
def test_averaged_checkpoints(kit, average):
    losses, module = run(kit, AVERAGES[average])
    for step in (2, 4, 5, 11):
        path = kit.folder / "run" / f"step={step}.ckpt"
        checkpoint = torch.load(path)
        loaded = kit.Net.load_from_checkpoint(path)
        acts = {quantizer.enabled for _, quantizer in quantizers_of(loaded)}
        assert acts == {step > 4}, step  # the switch comes before the batch behind step 4
        averaged = dict(loaded.named_parameters())
        assert all(torch.equal(value, checkpoint["state_dict"][name]) for name, value in averaged.items())
        differs = not torch.equal(averaged["net.0.weight"], checkpoint["current_model_state"]["net.0.weight"])
        assert differs == (step > 1)
        (predicted, *_) = kit.trainer().predict(kit.Net(), kit.held_out(), ckpt_path=path)
        assert torch.equal(predicted, kit.outputs(loaded)[:4])
    assert torch.equal(kit.outputs(module), kit.outputs(loaded))  # the average is the result of the run
    for step in (3, 4, 5, 8):
        again, resumed = run(kit, AVERAGES[average], resume=kit.folder / "run" / f"step={step}.ckpt")
        assert again == losses[step:], step
        assert torch.equal(kit.outputs(resumed), kit.outputs(module))


def test_no_stale_scale_in_the_average(kit):
    """At the switch the average takes the new scales over; from then on it averages them."""
    run(kit, AVERAGES["ema"])
    states = [torch.load(kit.folder / "run" / f"step={step}.ckpt") for step in range(1, 12)]
    for name in ("net.0.weight_quantizer.scale.value", "net.2.input_quantizer.scale.value"):
        averages = [state["state_dict"][name] for state in states]
        currents = [state["current_model_state"][name] for state in states]
        set_to = kit.Record(look=lambda trainer, module: kit.scales(module))
        kit.fit(kit.Net(), QATCallback(**W4A8), set_to, max_steps=11)
        wanted = set_to.seen[4][name]
        for step in range(4, 11):  # entry 4 is the checkpoint behind the first quantized step
            wanted = 0.8 * wanted + 0.2 * currents[step]
            assert torch.allclose(averages[step], wanted, rtol=1e-5)


def test_validation_uses_the_average_quantized(kit):
    class Watched(kit.Net):
        seen = []

        def on_validation_epoch_end(self):
            self.seen.append((self.trainer.global_step, kit.outputs(self)))

    run(kit, AVERAGES["ema"], cls=Watched, val_check_interval=3)
    assert [step for step, _ in Watched.seen] == [3, 6, 9]
    # Callbacks swap back before the module's own hook runs, so these are the current weights.
    for step, outputs in Watched.seen:
        state = torch.load(kit.folder / "run" / f"step={step}.ckpt")["current_model_state"]
        module = kit.Net()
        module.load_state_dict(state)
        assert torch.equal(outputs, kit.outputs(module))


def test_held_out_loss_is_the_averages(kit):
    logged = {}

    class Watched(kit.Net):
        def on_train_batch_start(self, batch, batch_idx):
            if "val_loss" in self.trainer.callback_metrics:
                logged.setdefault(self.trainer.global_step, float(self.trainer.callback_metrics["val_loss"]))

    run(kit, AVERAGES["ema"], cls=Watched, val_check_interval=3)
    _, y = kit.rows(10, seed=8).tensors
    for step in (3, 6, 9):
        module = kit.Net.load_from_checkpoint(kit.folder / "run" / f"step={step}.ckpt")
        assert logged[step] == pytest.approx(float((kit.outputs(module) - y).square().mean()), rel=1e-5)


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
def test_a_model_built_in_configure_model(kit):
    losses, module = run(kit, WeightAveraging, cls=kit.LazyNet)
    loaded = kit.LazyNet.load_from_checkpoint(kit.folder / "run" / "step=11.ckpt")
    assert torch.equal(kit.outputs(loaded), kit.outputs(module))
    again, _ = run(kit, WeightAveraging, cls=kit.LazyNet, resume=kit.folder / "run" / "step=6.ckpt")
    assert again == losses[6:]


def test_stochastic_weight_averaging(kit):
    module = kit.Net()
    weights = kit.Record(look=lambda trainer, module: module.net[0].weight.detach().clone())
    average = StochasticWeightAveraging(0.01, swa_epoch_start=2)
    kit.fit(module, QATCallback(**{**W4A8, "freeze_scales": None}), average, weights, max_steps=-1, max_epochs=4)
    wanted = torch.stack([weights.seen[epoch * 6] for epoch in (1, 2, 3)]).mean(0)  # at the start of epochs 1 to 3
    assert torch.allclose(module.net[0].weight, wanted, rtol=1e-5)
    assert all(quantizer.enabled for _, quantizer in quantizers_of(module))


@pytest.mark.parametrize(
    "average",
    [WeightAveraging, EMAWeightAveraging, lambda: StochasticWeightAveraging(0.01)],
    ids=["average", "ema", "stochastic"],
)
def test_the_wrong_order(kit, average):
    module, average = kit.Net(), average()
    name = type(average).__name__
    corrected = rf"put QATCallback first: Trainer\(callbacks=\[QATCallback\(...\), {name}\(...\)\]\)"
    with pytest.raises(ValueError, match=corrected):
        kit.fit(module, average, QATCallback("int4-g8"))
    assert not list(quantizers_of(module))
