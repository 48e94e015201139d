"""QuantizedFSDP under a Trainer, on two processes."""

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.utils.data import TensorDataset

from qlightning import DistillationCallback, QATCallback, QuantizedFSDP
from qlightning.cli import interface
from qlightning.data.loader import Loader
from qlightning.layers.convert import quantizers_of
from qlightning.layers.sharding import is_sharded
from qlightning.losses.features import MSE
from qlightning.strategies.reduce import EightBitReduceScatter

BATCH, STEPS = 8, 6

resuming = pytest.mark.filterwarnings("ignore:.*dirpath has changed", "ignore:.*exists and is not empty")


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
        self.losses = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = (self.net(x) - y).square().mean()
        self.losses.append(loss.detach().clone())
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", (self.net(x) - y).square().mean(), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Data(LightningDataModule):
    def train_dataloader(self):
        return Loader(rows(), batch_size=BATCH // 2)

    def val_dataloader(self):
        return held_out(2)


class Lazy(Net):
    def __init__(self):
        super().__init__()
        del self.net
        self.net = None

    def configure_model(self):
        if self.net is None:
            self.net = Net().net


def rows(count=BATCH * STEPS):
    generator = torch.Generator().manual_seed(5)
    return TensorDataset(torch.randn(count, 8, generator=generator), torch.randn(count, 4, generator=generator))


def held_out(devices):
    return Loader(rows(8), batch_size=4 // devices)


def fit(module, folder, *callbacks, steps=STEPS, ckpt_path=None, **options):
    """Under a strategy, every process takes its share of each batch: rows are dealt out in turn."""
    devices = torch.distributed.get_world_size() if "strategy" in options else 1
    trainer = Trainer(
        **{"accelerator": "cpu", "devices": devices, "logger": False, "enable_progress_bar": False, "max_steps": steps},
        **{"enable_checkpointing": any("Checkpoint" in str(c) for c in callbacks)},
        **{"enable_model_summary": False, "default_root_dir": folder},
        **{"num_sanity_val_steps": 1, "callbacks": list(callbacks), "limit_val_batches": 1, **options},
    )
    trainer.fit(module, Loader(rows(), batch_size=BATCH // devices), held_out(devices), ckpt_path=ckpt_path)
    return trainer


def whole(module):
    named = module.state_dict().items()
    return {name: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone() for name, t in named}


def mean(losses):
    total = torch.stack(losses)
    torch.distributed.all_reduce(total)
    return total / torch.distributed.get_world_size()


@pytest.mark.parametrize(("kind", "spec", "start"), [(Net, "int8-channel", 2), (Lazy, "int8-channel-lsq", 0)])
def test_losses_of_one_process(ranks, tmp_path, kind, spec, start):
    one = kind()
    trainer = fit(one, tmp_path, QATCallback(spec, start=start))
    trainer.validate(one, held_out(1), verbose=False)

    def check():
        module = kind()
        trainer = fit(module, tmp_path, QATCallback(spec, start=start), strategy=QuantizedFSDP())
        trainer.validate(module, held_out(2), verbose=False)
        assert len(trainer.strategy._gathers) == 3
        assert all(gather.coded for gather in trainer.strategy._gathers)
        return mean(module.losses), whole(module), trainer.callback_metrics["val_loss"]

    for losses, state, val_loss in ranks(2, check):
        assert torch.allclose(losses, torch.stack(one.losses), rtol=1e-4)
        for name, tensor in one.state_dict().items():
            if tensor.is_floating_point():
                assert torch.allclose(state[name], tensor, rtol=1e-3, atol=1e-5), name
        assert float(val_loss) == pytest.approx(float(trainer.callback_metrics["val_loss"]), rel=1e-4)


@pytest.mark.parametrize(
    "strategy",
    ["qlightning.QuantizedFSDP", {"class_path": "qlightning.QuantizedFSDP", "init_args": {"units": ["net.*"]}}],
    ids=["name", "class"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*does not have many workers")
def test_yaml(ranks, tmp_path, strategy):
    trainer = {"strategy": strategy, "accelerator": "cpu", "devices": 2, "max_steps": 2, "logger": False}
    trainer |= {"callbacks": [{"class_path": "qlightning.QATCallback", "init_args": {"weight": "int8-channel"}}]}
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    config = {"trainer": trainer | quiet, "model": f"{__name__}.Net", "data": f"{__name__}.Data"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))

    def check():
        cli = interface()(
            ["fit", "--config", str(tmp_path / "config.yaml"), "--trainer.default_root_dir", str(tmp_path)]
        )
        strategy = cli.trainer.strategy
        assert type(strategy) is QuantizedFSDP
        return [gather.coded for gather in strategy._gathers], strategy.units

    for coded, units in ranks(2, check):
        assert coded == [True] * 3
        assert units == (None if isinstance(strategy, str) else ["net.*"])


def saving(folder, **options):
    return ModelCheckpoint(folder, every_n_train_steps=3, save_top_k=-1, filename="{step}", **options)


@resuming
@pytest.mark.parametrize("distributed", [True, False])
def test_checkpoints_go_both_ways(ranks, tmp_path, distributed):
    """A sharded run resumes exactly; its checkpoint is one of a single process, and the other way round."""
    spec, path = "int8-channel-lsq", tmp_path / "step=3.ckpt"

    def interrupted():
        module = Net()
        strategy = QuantizedFSDP(save_distributed_checkpoint=distributed)
        fit(module, tmp_path, QATCallback(spec, start=2), saving(tmp_path), strategy=strategy)
        again = Net()
        strategy = QuantizedFSDP(save_distributed_checkpoint=distributed)
        fit(again, tmp_path, QATCallback(spec, start=2), saving(tmp_path), ckpt_path=path, strategy=strategy)
        return torch.stack(module.losses), torch.stack(again.losses), whole(module), whole(again)

    for losses, resumed, state, other in ranks(2, interrupted):
        assert torch.equal(losses[3:], resumed)
        assert all(torch.equal(state[name], other[name]) for name in state)

    file = tmp_path / "one.ckpt"
    if distributed:
        dcp_to_torch_save(path, file)
        torch.save({"state_dict": torch.load(file, weights_only=True)["state_dict"]}, file)
    else:
        file = path
    plain = Net()
    plain.load_state_dict(torch.load(file, weights_only=True)["state_dict"])
    assert [type(layer).__name__ for layer in plain.net[::2]] == ["QuantLinear"] * 3
    assert all(quantizer.enabled and quantizer.ready for _, quantizer in quantizers_of(plain))


@resuming
def test_a_checkpoint_of_one_process_is_taken_up(ranks, tmp_path):
    spec = "int8-channel-lsq"
    one = Net()
    fit(one, tmp_path, QATCallback(spec, start=2), saving(tmp_path))

    def check():
        module = Net()
        options = {"strategy": QuantizedFSDP(), "ckpt_path": tmp_path / "step=3.ckpt"}
        fit(module, tmp_path, QATCallback(spec, start=2), saving(tmp_path / "other"), **options)
        return mean(module.losses)

    for losses in ranks(2, check):
        assert torch.allclose(losses, torch.stack(one.losses)[3:], rtol=1e-4)


class Eight(Net):
    """torchao's optimizer keeps moments of what is large enough in eight bits."""

    def __init__(self):
        super().__init__()
        self.net[2] = nn.Sequential(nn.Linear(16, 128, bias=False), nn.Linear(128, 128), nn.Linear(128, 16, bias=False))

    def configure_optimizers(self):
        from torchao.optim import AdamW8bit

        return AdamW8bit(self.parameters(), lr=0.01)


RUNS = {
    "accumulated and clipped": (Net, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}, {}),
    "bf16-true": (Net, {"precision": "bf16-true", "gradient_clip_val": 0.1}, {}),
    "bf16-mixed, gradients in eight bits": (Net, {"precision": "bf16-mixed"}, {"gradients": EightBitReduceScatter()}),
    "optimizer in eight bits": (Eight, {}, {"units": ["net.*"]}),
}


@pytest.mark.filterwarnings("ignore:.*Deprecation:", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_beside_other_options(ranks, tmp_path):
    """A run of one process, and one in which weights are gathered in full, end where a run on codes ends."""

    def run(name, *, devices):
        kind, options, own = RUNS[name]
        module = kind()
        if devices > 1:
            options = options | {"strategy": QuantizedFSDP(**own)}
        # torchao compiles its steps, which a forked process waits for without end once its parent has compiled anything
        with torch.compiler.set_stance("force_eager"):
            trainer = fit(module, tmp_path, QATCallback("int8-channel-lsq"), steps=3, **options)
        if devices == 1:
            return torch.stack(module.losses).float()
        assert all(gather.coded for gather in trainer.strategy._gathers)
        assert trainer.strategy._gathers
        return mean(module.losses).float()

    one = {name: run(name, devices=1) for name in RUNS}
    for found in ranks(2, lambda: {name: run(name, devices=2) for name in RUNS}):
        for name, losses in found.items():
            near = 1e-4 if name in ("accumulated and clipped", "optimizer in eight bits") else 0.03
            assert torch.allclose(losses, one[name], rtol=near), name


@pytest.mark.parametrize("at", [None, "net"])
def test_a_teacher_is_sharded_too(ranks, tmp_path, at):
    def run(**options):
        module, teacher = Net(), Net()
        torch.nn.init.normal_(teacher.net[0].weight, generator=torch.Generator().manual_seed(1))
        losses = {"forward" if at else "net": MSE()}
        distillation = DistillationCallback(
            teacher if at is None else teacher.net, task_weight=0.5, losses=losses, at=at
        )
        fit(module, tmp_path, QATCallback("int8-channel"), distillation, steps=3, **options)
        return module.losses, whole(module), distillation._teacher

    losses, state, kept = run()

    def check():
        losses, state, teacher = run(strategy=QuantizedFSDP())
        assert all(is_sharded(parameter) for parameter in teacher.module.parameters())
        return mean(losses), state, teacher.digest

    for found, other, digest in ranks(2, check):
        assert torch.allclose(found, torch.stack(losses), rtol=1e-4)
        assert torch.allclose(other["net.0.weight"], state["net.0.weight"], rtol=1e-3, atol=1e-5)
        assert digest == kept.digest
