"""Kill and go on, on several processes: bit for bit on as many, and on another number of them from the same state."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import distributed as dist

from qlightning import QATCallback

WAYS = {
    "ddp": ("ddp", {}),
    "fsdp2, one file": ("fsdp2", {"save_distributed_checkpoint": False}),
    "fsdp2, sharded": ("fsdp2", {}),
    "fsdp1, one file": ("fsdp1", {}),
    "fsdp1, sharded": ("fsdp1", {"state_dict_type": "sharded"}),
}


def qat(kit):
    """Inputs observe in steps 1 to 3, and everything acts, its weights by then another, from step 4 on."""
    return QATCallback("int4-channel-lsq", "int8-tensor-lsq", start=4, calibration=3)


class Noisy:
    """A module that draws random numbers, others in each process."""

    @staticmethod
    def of(kit):
        class Net(kit.Net):
            def training_step(self, batch, batch_idx):
                x, y = batch
                return super().training_step((x + 0.1 * torch.randn_like(x), y), batch_idx)

        return Net()


def every_step(folder, **options):
    return ModelCheckpoint(
        folder,
        filename="{step}",
        every_n_train_steps=2,
        save_top_k=-1,
        save_on_train_epoch_end=False,
        enable_version_counter=False,
        **options,
    )


def save(kit, way, folder):
    name, options = WAYS[way]
    torch.manual_seed(dist.get_rank())
    losses, _ = kit.fit(
        qat(kit), every_step(folder), module=Noisy.of(kit), strategy=kit.strategy(name, **options), steps=10
    )
    return losses


def go_on(kit, way, path):
    name, options = WAYS[way]
    torch.manual_seed(99)
    losses, _ = kit.fit(
        qat(kit), module=Noisy.of(kit), strategy=kit.strategy(name, **options), steps=10, ckpt_path=path
    )
    return losses


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=pytest.mark.slow if way.startswith("fsdp1") else ()) for way in WAYS]
)
def test_the_same_losses_on_as_many(ranks, kit, way):
    def check():
        losses = save(kit, way, kit.folder)
        # in float while it observes, and quantized at the end of an epoch
        return losses, {step: go_on(kit, way, kit.folder / f"step={step}.ckpt") for step in (2, 8)}

    for losses, resumed in ranks(2, check):
        assert len(losses) == 10
        for step, rest in resumed.items():
            assert rest == losses[step:]
