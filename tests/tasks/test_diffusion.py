import pytest
import torch

from qlightning.schedules import Cosine
from qlightning.tasks import Diffusion

from .conftest import DIT, UNET

SMALL = {"timesteps": 40, "samples": 4, "sample_every": 2, "sampling_steps": 3, "lr": 1e-2}


@pytest.mark.parametrize("config", [UNET, DIT], ids=lambda c: c["_class_name"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_fit_learns_and_draws_its_samples(images, trainer, tmp_path, config, prediction):
    torch.manual_seed(0)
    task = Diffusion(config, prediction=prediction, schedule=Cosine(warmup=1), **SMALL)
    before = trainer().validate(task, images, verbose=False)[0]
    for png in tmp_path.rglob("*.png"):
        png.unlink()
    run = trainer(max_epochs=4)
    run.fit(task, images)
    assert sorted(png.name for png in (tmp_path / "samples").glob("*.png")) == ["step=0000006.png", "step=0000012.png"]
    after = run.validate(task, images, verbose=False)[0]
    assert after["val_loss"] < 0.97 * before["val_loss"]
    names = {"val_loss", "val_eps_mse", *(f"val_eps_mse_t{i}-{i + 10}" for i in (0, 10, 20, 30))}
    assert set(after) == names
    assert (after["val_loss"] == after["val_eps_mse"]) == (prediction == "epsilon")


def test_evaluation_is_exact_and_repeats(images, trainer):
    task = Diffusion(UNET, **SMALL)
    first = trainer().validate(task, images, verbose=False)[0]
    torch.manual_seed(123)
    assert trainer().validate(task, images, verbose=False)[0] == first
    assert trainer().test(task, images, verbose=False)[0] == {k.replace("val", "test"): v for k, v in first.items()}

    errors, steps = [], []
    for index, start in enumerate((0, 4, 8)):
        image = images.rows.columns["image"][start : start + 4]
        noise, step = task.process.held_out(image, index)
        with torch.no_grad():
            output = task.model(task.process.scheduler.add_noise(image, noise, step), step).sample
        errors.append((output - noise).square().mean((1, 2, 3)))
        steps.append(step)
    errors, steps = torch.cat(errors), torch.cat(steps)
    assert first["val_loss"] == pytest.approx(errors.mean().item(), rel=1e-5)
    last = errors[steps >= 30].mean().item()
    assert first["val_eps_mse_t30-40"] == pytest.approx(last, rel=1e-5)


@pytest.mark.parametrize("config", [UNET, DIT], ids=lambda c: c["_class_name"])
def test_load_from_checkpoint_needs_only_the_file(images, trainer, tmp_path, config):
    task = Diffusion(config, prediction="v_prediction", noise="squaredcos_cap_v2", buckets=2, **SMALL)
    run = trainer()
    run.fit(task, images)
    run.save_checkpoint(tmp_path / "last.ckpt")
    loaded = Diffusion.load_from_checkpoint(tmp_path / "last.ckpt")
    assert dict(loaded.hparams) == dict(task.hparams)
    ours, theirs = (trainer().predict(t, images) for t in (task, loaded))
    assert [tuple(batch.shape) for batch in ours] == [(4, 1, 8, 8), (4, 1, 8, 8), (2, 1, 8, 8)]
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert all(batch.abs().max() <= 1 for batch in ours)


def test_classes_reach_a_conditional_model_only(images):
    image, label = (images.rows.columns[name][:2] for name in ("image", "label"))
    step = torch.zeros(2, dtype=torch.long)
    torch.manual_seed(0)
    for config, classes in ((UNET, 0), (DIT, 3), ({**UNET, "num_class_embeds": 3}, 3)):
        task = Diffusion(config)
        task.configure_model()
        task.eval()
        # a fresh DiT multiplies its blocks by zero: give every parameter a value that lets the class through
        for parameter in task.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        assert task.classes == classes
        same = torch.equal(task(image, step, label), task(image, step, (label + 1) % 3))
        assert same == (classes == 0)


def test_a_missing_class_name_is_an_error(images, trainer):
    with pytest.raises(ValueError, match="UNet2DModel"):
        trainer().fit(Diffusion({"sample_size": 8}), images)
