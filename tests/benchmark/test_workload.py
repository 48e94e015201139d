"""The shapes that are measured."""

import pytest
import torch

from qlightning.benchmark.workload import fitting, workload


@pytest.mark.parametrize("size", ["llama-10m", "vit-b", "unet"])
def test_a_batch_has_a_loss_with_a_gradient_for_every_weight(size) -> None:
    work = workload(size, tokens=197, length=64, layers=1)
    work.loss(work.model(**work.inputs)).backward()
    assert work.model.training
    assert all(parameter.grad is not None for parameter in work.model.parameters())


def test_llama_10m_is_the_one_of_the_published_floors() -> None:
    work = workload("llama-10m", tokens=1024, length=256, dtype=torch.bfloat16)
    assert (work.model.config.num_hidden_layers, work.model.config.hidden_size) == (4, 512)
    assert work.inputs["input_ids"].shape == (4, 256)
    assert {parameter.dtype for parameter in work.model.parameters()} == {torch.bfloat16}
    assert work.model.model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize(("size", "billions"), [("llama-1b", 1.498), ("llama-8b", 8.030)])
def test_the_large_ones_have_the_parameters_of_llama_3(size, billions) -> None:
    work = workload(size, tokens=64, device="meta")
    count = sum(parameter.numel() for parameter in work.model.parameters())
    assert count / 1e9 == pytest.approx(billions, abs=0.001)


def test_an_unknown_size_is_answered_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"llama-1b.*unet"):
        workload("llama-2b")


def test_a_cpu_gets_the_smallest() -> None:
    assert fitting(torch.device("cpu"), 1024) == "llama-10m"
