"""Tiny trained models for the tests of export. Nothing is trained: random weights are as good, and faster."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from qlightning.layers.convert import convert
from qlightning.tasks import CausalLM

LLAMA = {
    "model_type": "llama",
    "vocab_size": 48,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


class Plain(LightningModule):
    """A user's own module: no transformers in it."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.example_input_array = torch.linspace(-2, 2, 3 * width).view(3, width)
        self.net = nn.Sequential(nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, width, bias=False), nn.LayerNorm(width))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])


class Kit:
    """What the tests export."""

    LLAMA, Plain, Task = LLAMA, Plain, CausalLM

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @staticmethod
    def llama(
        rules: Any = "int4-g32", *, dtype: torch.dtype = torch.float32, tied: Any = "float", **config: Any
    ) -> CausalLM:
        """A converted CausalLM in eval mode. Its buffers stay float32, as from_pretrained leaves them."""
        torch.manual_seed(0)
        module = CausalLM({**LLAMA, **config})
        module.configure_model()
        for parameter in module.parameters():
            parameter.data = (parameter.data * (8 if parameter.dim() > 1 else 1)).to(dtype)
        convert(module, rules, tied=tied, min_coverage=0.0)
        return module.eval()

    @staticmethod
    def plain(rules: Any = "int4-g32", width: int = 32) -> Plain:
        torch.manual_seed(0)
        module = Plain(width)
        convert(module, rules, min_coverage=0.0)
        return module.eval()

    def checkpoint(self, module: LightningModule) -> Path:
        """The module's checkpoint, as a Trainer writes it."""
        path = self.folder / "run" / "last.ckpt"
        trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=self.folder)
        trainer.strategy.connect(module)
        trainer.save_checkpoint(path)
        return path

    @property
    def out(self) -> Path:
        return self.folder / "artifact"

    @staticmethod
    @torch.no_grad()
    def logits(module: CausalLM, ids: Tensor) -> Tensor:
        return module(ids)

    @staticmethod
    def ids() -> Tensor:
        return torch.randint(48, (2, 9), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def kit(tmp_path: Path) -> Kit:
    return Kit(tmp_path)
