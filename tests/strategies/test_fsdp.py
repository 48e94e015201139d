"""QuantizedFSDP under a Trainer, on two processes."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from qlightning import QATCallback, QuantizedFSDP

BATCH, STEPS = 8, 6


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


def fit(module, folder, *callbacks, steps=STEPS, **options):
    """Under a strategy, every process takes its share of each batch: rows are dealt out in turn."""
    devices = torch.distributed.get_world_size() if "strategy" in options else 1
    deal = {"sampler": DistributedSampler(rows(), shuffle=False)} if devices > 1 else {}
    trainer = Trainer(
        **{"accelerator": "cpu", "devices": devices, "logger": False, "enable_progress_bar": False, "max_steps": steps},
        **{"use_distributed_sampler": False},
        **{"enable_model_summary": False, "enable_checkpointing": False, "default_root_dir": folder},
        **{"num_sanity_val_steps": 1, "callbacks": list(callbacks), "limit_val_batches": 1, **options},
    )
    trainer.fit(module, DataLoader(rows(), BATCH // devices, **deal), DataLoader(rows(8), 4))
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

    def check():
        module = kind()
        trainer = fit(module, tmp_path, QATCallback(spec, start=start), strategy=QuantizedFSDP())
        assert len(trainer.strategy._gathers) == 3
        assert all(gather.coded for gather in trainer.strategy._gathers)
        return mean(module.losses), whole(module), trainer.callback_metrics["val_loss"]

    for losses, state, val_loss in ranks(2, check):
        assert torch.allclose(losses, torch.stack(one.losses), rtol=1e-4)
        for name, tensor in one.state_dict().items():
            if tensor.is_floating_point():
                assert torch.allclose(state[name], tensor, rtol=1e-3, atol=1e-5), name
        assert float(val_loss) == pytest.approx(float(trainer.callback_metrics["val_loss"]), rel=1e-4)
