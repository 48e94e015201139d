"""8-bit moments on shards: the losses of one process, and exact on resume."""

import pytest
import torch
from torch import nn

from qlightning import EightBitAdam, QATCallback

LIBRARIES = {"torchao": "quantized fsdp", "bitsandbytes": "ddp"}


def wide(kit):
    """Weights of which each of two processes still has enough for 8 bits."""

    class Wide(kit.Net):
        def __init__(self):
            super().__init__(lr=0.003)
            generator = torch.Generator().manual_seed(4)
            self.body.first = nn.Sequential(nn.Linear(8, 1024), nn.ReLU(), nn.Linear(1024, 16))
            for parameter in self.body.first.parameters():
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1

    return Wide()


def fit(kit, library, *callbacks, steps=8, ckpt_path=None, alone=False):
    strategy = "auto" if alone else LIBRARIES[library]
    callbacks = QATCallback("int4-channel-lsq"), EightBitAdam(library), *callbacks
    with torch.compiler.set_stance(
        "force_eager"
    ):  # torchao compiles its step, for which forked processes wait for ever
        return kit.fit(*callbacks, module=wide(kit), strategy=strategy, steps=steps, ckpt_path=ckpt_path)


@pytest.mark.parametrize("library", LIBRARIES)
def test_it_trains_and_goes_on(ranks, kit, library):
    def check():
        losses, trainer = fit(kit, library, kit.every_step(kit.folder))
        weight = trainer.lightning_module.body.first[0].weight
        memory = trainer.optimizers[0].state[weight]
        kind = type(getattr(memory.get("exp_avg"), "_local_tensor", memory.get("state1"))).__name__
        rest, _ = fit(kit, library, ckpt_path=kit.folder / "step=4.ckpt")
        return losses, rest, kind

    (alone,) = ranks(1, lambda: fit(kit, library, alone=True)[0])
    for losses, rest, kind in ranks(2, check):
        assert kind == ("OptimState8bit" if library == "torchao" else "Tensor")
        assert losses == pytest.approx(alone, rel=1e-4)
        assert losses[-1] < 0.8 * losses[0]
        assert rest == losses[4:]


@pytest.mark.parametrize(
    ("library", "options", "call"),
    [
        ("bitsandbytes", {}, r"QuantizedFSDP: write EightBitAdam\('torchao'\)"),
        ("torchao", {"save_distributed_checkpoint": False}, r"QuantizedFSDP\(save_distributed_checkpoint=True\)"),
    ],
)
def test_what_cannot_be_sharded(ranks, kit, library, options, call):
    def check():
        with pytest.raises(ValueError, match=call):
            kit.fit(
                EightBitAdam(library), module=wide(kit), strategy=kit.strategy("quantized fsdp", **options), steps=1
            )

    ranks(2, check)
