import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss
from transformers import ViTConfig, ViTForImageClassification

from qlightning.schedules import Cosine
from qlightning.tasks import ImageClassification

from .conftest import VIT


def test_fit_learns_and_metrics_equal_scikit_learns(images, trainer):
    torch.manual_seed(0)
    task = ImageClassification(VIT, lr=1e-2, schedule=Cosine(warmup=2))
    before = trainer().validate(task, images, verbose=False)[0]
    run = trainer(max_epochs=5)
    run.fit(task, images)
    logged = run.validate(task, images, verbose=False)[0]

    label = images.rows.columns["label"].numpy()
    with torch.no_grad():
        probability = task.eval()(images.rows.columns["image"]).double().softmax(1).numpy()
    assert logged["val_accuracy"] == pytest.approx(accuracy_score(label, probability.argmax(1)))
    assert logged["val_loss"] == pytest.approx(log_loss(label, probability, labels=[0, 1, 2]), rel=1e-5)
    assert logged["val_loss"] < before["val_loss"] - 0.05
    tested = run.test(task, images, verbose=False)[0]
    assert tested == {name.replace("val", "test"): value for name, value in logged.items()}


def test_load_from_checkpoint_needs_only_the_file(images, trainer, tmp_path):
    task = ImageClassification(VIT, label_smoothing=0.1, schedule=Cosine())
    run = trainer()
    run.fit(task, images)
    run.save_checkpoint(tmp_path / "last.ckpt")
    loaded = ImageClassification.load_from_checkpoint(tmp_path / "last.ckpt")
    assert loaded.model.config.num_labels == 3
    assert loaded.schedule == Cosine()
    assert loaded.hparams["label_smoothing"] == 0.1
    ours, theirs = (trainer().predict(t, images) for t in (task, loaded))
    assert [tuple(batch.shape) for batch in ours] == [(4, 3), (4, 3), (2, 3)]
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_label_smoothing_acts_in_training_only(images, trainer):
    torch.manual_seed(0)
    task = ImageClassification(VIT, label_smoothing=0.3, lr=0.0)
    run = trainer(limit_train_batches=1)
    run.fit(task, images)
    batch = {name: column[:4] for name, column in images.rows.columns.items()}
    logits = task.eval()(batch["image"])
    losses = -logits.log_softmax(1)
    plain = losses.gather(1, batch["label"][:, None]).mean().item()
    smooth = 0.7 * plain + 0.3 * losses.mean().item()
    assert run.callback_metrics["train_loss"].item() == pytest.approx(smooth, rel=1e-5)
    alone = trainer(limit_val_batches=1).validate(task, images, verbose=False)[0]
    assert alone["val_loss"] == pytest.approx(plain, rel=1e-5)


def test_a_local_folder_gives_its_weights(images, trainer, tmp_path):
    source = ViTForImageClassification(ViTConfig(**{k: v for k, v in VIT.items() if k != "model_type"}, num_labels=3))
    source.save_pretrained(tmp_path / "model")
    task = ImageClassification(str(tmp_path / "model"))
    trainer().validate(task, images, verbose=False)
    assert all(torch.equal(a, b) for a, b in zip(task.parameters(), source.parameters(), strict=True))


def test_too_few_labels_are_an_error(images, trainer):
    with pytest.raises(ValueError, match="set num_labels=3"):
        trainer().fit(ImageClassification({**VIT, "num_labels": 2}), images)
