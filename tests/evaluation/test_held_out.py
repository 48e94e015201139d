import pytest
import torch
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from qlightning.evaluation import HeldOut


def test_stages_are_apart_and_empty_after_reading():
    held_out = HeldOut(loss=MeanMetric(), accuracy=MulticlassAccuracy(3, average="micro"))
    held_out.update("val", loss=torch.tensor([1.0, 3.0]), accuracy=(torch.tensor([0, 1]), torch.tensor([0, 2])))
    held_out.update("test", loss=torch.tensor([5.0]), accuracy=(torch.tensor([1]), torch.tensor([1])))
    assert held_out.finish("val") == {"val_loss": 2.0, "val_accuracy": 0.5}
    held_out.update("val", loss=torch.tensor([7.0]), accuracy=(torch.tensor([2]), torch.tensor([2])))
    assert held_out.finish("val") == {"val_loss": 7.0, "val_accuracy": 1.0}
    assert held_out.finish("test") == {"test_loss": 5.0, "test_accuracy": 1.0}


def test_reading_in_inference_mode_leaves_metrics_that_a_fit_can_update():
    held_out = HeldOut(loss=MeanMetric())
    with torch.inference_mode():
        held_out.update("val", loss=torch.ones(2))
        held_out.finish("val")
    held_out.update("val", loss=torch.full((2,), 4.0))
    assert held_out.finish("val")["val_loss"] == 4.0


def test_nothing_of_it_goes_into_checkpoints():
    assert not HeldOut(loss=MeanMetric()).state_dict()


def test_an_unknown_metric_is_an_error():
    with pytest.raises(KeyError, match="val_perplexity"):
        HeldOut(loss=MeanMetric()).update("val", perplexity=torch.ones(1))
