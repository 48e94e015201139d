"""A small model that can be sharded, and its fits on any number of processes, for the tests of several ranks."""

from pathlib import Path
from typing import Any

import lightning.pytorch.strategies.fsdp
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import (
    FSDPModule,
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    StateDictType,
    fully_shard,
)
from torch.utils.data import TensorDataset

from qlightning import QuantizedFSDP
from qlightning.data.loader import Loader
from qlightning.schedules.learning_rate import Constant

FEATURES, WIDTH, ROWS = 8, 16, 64


class Block(nn.Module):
    """A residual block; what is sharded as one unit."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Body(nn.Module):
    """(N, 8) -> (N, 4)."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.last = nn.Linear(WIDTH, 4)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if "norm" not in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


class Net(LightningModule):
    """Regression. Built in `__init__`; `configure_model` is a user's: it shards under a ModelParallelStrategy."""

    def __init__(self, optimizer: Any = torch.optim.AdamW, lr: float = 0.01) -> None:
        super().__init__()
        self.optimizer, self.lr, self.schedule = optimizer, lr, Constant()
        self.body = Body()

    def configure_model(self) -> None:
        strategy = self.trainer.strategy
        own = isinstance(strategy, ModelParallelStrategy) and not isinstance(strategy, QuantizedFSDP)
        if own and not isinstance(self.body, FSDPModule):
            shard(self.body, self.device_mesh["data_parallel"])

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return (self(x) - y).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx), sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.parameters(), lr=self.lr, weight_decay=0.1)
        total, schedule = self.trainer.estimated_stepping_batches, self.schedule
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule.factor(step, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def shard(body: Body, mesh: Any) -> None:
    """As the tutorials of FSDP2 do it: block by block, then the rest."""
    for block in body.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(body, mesh=mesh)


class CPUFSDP(FSDPStrategy):
    """FSDP1 on the CPU; Lightning's own insists on a GPU, in this one method alone."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        options = {"cpu_offload": self.cpu_offload, "mixed_precision": self.mixed_precision_config}
        return FullyShardedDataParallel(
            model, sharding_strategy=self.sharding_strategy, device_id=self.root_device, **options, **self.kwargs
        )


def _full_state_dict_on_cpu(module: nn.Module, world_size: int, rank0_only: bool = True) -> Any:
    """As Lightning's, but without an offload to the CPU, which on a CPU keeps views of storage that is freed."""
    whole = {"offload_to_cpu": False, "rank0_only": rank0_only}
    return FullyShardedDataParallel.state_dict_type(
        module,
        StateDictType.FULL_STATE_DICT,
        FullStateDictConfig(**whole),
        FullOptimStateDictConfig(**whole),
    )


class Losses(Callback):
    """The global loss of every step: the mean over ranks."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        loss = outputs["loss"].detach().clone().double()
        if trainer.world_size > 1:
            dist.all_reduce(loss)
        self.values.append(float(loss) / trainer.world_size)


class Kit:
    """What the tests build their runs from."""

    Net, Body, Losses, Loader = Net, Body, Losses, Loader
    shard = staticmethod(shard)

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @staticmethod
    def in_float64() -> None:
        """Let everything of this process, a fork, be float64, also what is float32 whatever the model's dtype."""
        torch.set_default_dtype(torch.float64)
        torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
        torch.float32 = torch.float64  # type: ignore[misc]

    def strategy(self, name: str, **options: Any) -> Any:
        """ "ddp", "fsdp1", "quantized fsdp", or "fsdp2", which is a user's own fully_shard."""
        size = dist.get_world_size() if dist.is_initialized() else 1
        if name == "quantized fsdp":
            return QuantizedFSDP(**options)
        if name == "fsdp2":
            return ModelParallelStrategy(data_parallel_size=size, tensor_parallel_size=1, **options)
        if name == "fsdp1":
            lightning.pytorch.strategies.fsdp._get_full_state_dict_context = _full_state_dict_on_cpu
            return CPUFSDP(auto_wrap_policy={Block}, **options)
        return "ddp" if size > 1 else "auto"

    def loader(self, batch: int = 8, **options: Any) -> Loader:
        """Shuffled batches of so many samples over all ranks together: eight per epoch."""
        size = dist.get_world_size() if dist.is_initialized() else 1
        generator = torch.Generator().manual_seed(7)
        x = torch.randn(ROWS, FEATURES, generator=generator)
        y = torch.stack([x[:, :4].sum(1), x[:, 0] * x[:, 1], x[:, 2].abs(), x[:, 3]], 1)
        return Loader(TensorDataset(x, y), batch_size=batch // size, shuffle=True, seed=3, **options)

    def trainer(self, *callbacks: Callback, strategy: Any = "ddp", steps: int = 50, **options: Any) -> Trainer:
        size = dist.get_world_size() if dist.is_initialized() else 1
        return Trainer(
            callbacks=list(callbacks),
            **{
                "accelerator": "cpu",
                "strategy": self.strategy(strategy) if isinstance(strategy, str) else strategy,
                "devices": size,
                "max_steps": steps,
                "logger": False,
                "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "num_sanity_val_steps": 0,
                "limit_val_batches": 1,
                "default_root_dir": self.folder,
                **options,
            },
        )

    @staticmethod
    def every_step(folder: Path, **options: Any) -> ModelCheckpoint:
        """Saves after every second step."""
        return ModelCheckpoint(
            folder,
            filename="{step}",
            every_n_train_steps=2,
            save_top_k=-1,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
            **options,
        )

    def fit(self, *callbacks: Callback, module: LightningModule | None = None, ckpt_path: Any = None, **options: Any):
        """Returns (losses of all steps over all ranks, the trainer)."""
        losses = Losses()
        trainer = self.trainer(*callbacks, losses, **options)
        trainer.fit(module or Net(), self.loader(), ckpt_path=ckpt_path)
        return losses.values, trainer


@pytest.fixture
def kit(tmp_path: Path) -> Kit:
    return Kit(tmp_path)


@pytest.fixture(scope="session")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes a kit with a folder of its own, for fixtures that outlive a test."""
    return lambda: Kit(tmp_path_factory.mktemp("kit"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What FSDP1 advises, and Lightning of folders and callbacks of a run that is resumed."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for message in (
                ".*has both parameters with requires_grad",
                "FSDP.state_dict_type",
                "`_get_pg_default_device` will be deprecated",
                "Multiple backends are registered with this ProcessGroup",
                "Please use DTensor instead and we are deprecating ShardedTensor",
                "`load_state_dict` is deprecated",
                "Be aware that when using `ckpt_path`, callbacks",
                "You defined a `validation_step` but have no `val_dataloader`",
                "Checkpoint directory .* exists and is not empty",
            ):
                item.add_marker(pytest.mark.filterwarnings(f"ignore:{message}"))
