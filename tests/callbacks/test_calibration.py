"""`qlightning calibrate`: weights found from data, without a step of training, in a checkpoint like any other."""

import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

from qlightning.cli import main
from qlightning.layers.convert import quantizers_of

pytestmark = [
    # all three are about how Lightning 2.6 calls jsonargparse 4.53, and about its demonstration data
    pytest.mark.filterwarnings(r"ignore:\s*.*was deprecated in v4:DeprecationWarning"),
    pytest.mark.filterwarnings(r"ignore:\s*By default only one Jsonargparse:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .*dataloader"),
]

RUN = [
    *("--model", "lightning.pytorch.demos.boring_classes.BoringModel"),
    *("--data", "lightning.pytorch.demos.boring_classes.BoringDataModule"),
    *("--trainer.accelerator", "cpu", "--trainer.logger", "false", "--trainer.enable_checkpointing", "false"),
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false", "--trainer.max_steps", "3"),
]


def checkpoint(tmp_path, *words: str) -> dict:
    out = tmp_path / "calibrated.ckpt"
    main(["calibrate", *RUN, *words, "--out", str(out), "--traceback"])
    return torch.load(out, weights_only=True)


def test_weights_are_found_and_nothing_is_trained(tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO")
    saved = checkpoint(tmp_path, "--method", "LSQ", "--method.bits", "3", "--solver", "GPTQ")
    assert saved["global_step"] == 0
    assert "weights found by GPTQ" in caplog.text
    torch.manual_seed(0)
    start = BoringModel()
    loaded = BoringModel.load_from_checkpoint(tmp_path / "calibrated.ckpt")
    ((_, quantizer),) = quantizers_of(loaded)
    assert quantizer.enabled
    assert torch.equal(quantizer(loaded.layer.weight), loaded.layer.weight)  # the solution lies on the grid
    assert torch.equal(loaded.layer.bias, start.layer.bias)
    assert not torch.equal(loaded.layer.weight, start.layer.weight)


@pytest.mark.slow
def test_on_two_processes(tmp_path, monkeypatch, ranks) -> None:
    """Both read the same data, since Lightning's sampler is left out, and share it out."""
    monkeypatch.chdir(tmp_path)
    words = ["--method", "LSQ", "--method.bits", "3", "--solver", "GPTQ", "--solver.batches", "6"]

    def check():
        (tmp_path / str(torch.distributed.get_rank())).mkdir()
        monkeypatch.chdir(tmp_path / str(torch.distributed.get_rank()))
        both = ["--trainer.strategy", "ddp", "--trainer.devices", "2", "--trainer.use_distributed_sampler", "false"]
        return checkpoint(tmp_path, *words, *both)["state_dict"]

    alone = checkpoint(tmp_path, *words)["state_dict"]
    first, second = ranks(2, check)
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())
    torch.testing.assert_close(first["layer.weight"], alone["layer.weight"])


def test_a_schedule_does_not_put_it_off(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    saved = checkpoint(tmp_path, "--method", "LSQ", "--method.start", "0.5", "--solver", "RTN")
    assert saved["global_step"] == 0
    assert any(key.endswith("weight_quantizer._extra_state") for key in saved["state_dict"])


def test_what_is_quantized_must_be_said(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="--method LSQ"):
        checkpoint(tmp_path, "--solver", "GPTQ")


def test_a_solver_must_be_named(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["calibrate", *RUN, "--method", "LSQ", "--out", "x.ckpt"])
    assert "solver" in capsys.readouterr().err
