"""Tiny data, tiny models and a quiet Trainer for the tasks' tests."""

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader, Dataset

LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
VIT = {
    "model_type": "vit",
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
UNET = {
    "_class_name": "UNet2DModel",
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [8, 8],
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "add_attention": False,
}
DIT = {
    "_class_name": "DiTTransformer2DModel",
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "patch_size": 4,
    "num_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_embeds_ada_norm": 3,
}


class Rows(Dataset):
    """A dict of tensors, row by row."""

    def __init__(self, **columns: torch.Tensor) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: column[index] for name, column in self.columns.items()}


class Tiny(LightningDataModule):
    """Ten rows for every stage, in batches of four: the last batch is smaller than the others."""

    def __init__(self, rows: Rows, **facts: float) -> None:
        super().__init__()
        self.rows = rows
        self.__dict__.update(facts)

    def _loader(self) -> DataLoader:
        return DataLoader(self.rows, batch_size=4)

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = _loader


@pytest.fixture
def text() -> Tiny:
    ids = torch.randint(13, (10, 9), generator=torch.Generator().manual_seed(0))
    return Tiny(Rows(input_ids=ids), vocab_size=13, bytes_per_token=2.5)


@pytest.fixture
def images() -> Tiny:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand((10, 1, 8, 8), generator=generator) * 2 - 1
    return Tiny(Rows(image=image, label=torch.randint(3, (10,), generator=generator)), num_classes=3)


@pytest.fixture
def trainer(tmp_path):
    """A Trainer factory: CPU, no bars, no checkpoints, the run folder under `tmp_path`."""

    def make(**options):
        options = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, **options}
        return Trainer(
            accelerator="cpu",
            default_root_dir=tmp_path,
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=1,
            **options,
        )

    return make
