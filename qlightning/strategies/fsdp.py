"""QuantizedFSDP: FSDP2 for any LightningModule, which gathers codes instead of weights."""

from datetime import timedelta
from typing import Any

from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from qlightning.strategies.gather import CodeGather, KeptGather, gathers_of
from qlightning.strategies.plan import Plan
from qlightning.strategies.reduce import EightBitReduceScatter, reduce_with
from qlightning.strategies.shard import roots_of, shard, units_of
from qlightning.strategies.shard_gradients import finished_on_shards


class QuantizedFSDP(ModelParallelStrategy):
    """Shards parameters, gradients and optimizer states over all processes, block by block.

    Example::

        Trainer(strategy=QuantizedFSDP(), callbacks=[QATCallback("int4-g128")])

    The module is sharded after it was converted and before its optimizers are built, without any code of the user's.
    Where weights are quantized, each process quantizes its own shard and the all-gather moves codes and scales, with
    the same numbers as if weights were gathered and then quantized. What cannot travel so (see the table it prints)
    and what does not act yet is gathered in full. Masks and the gradients of learned scales are computed on the shards.
    Teachers of DistillationCallback are sharded too.

    Args:
        replicas: Copies of the sharded module (hybrid sharding, HSDP): with 2, each half of the processes, neighbours,
            share one copy between them, and gradients are averaged over both. With as many as there are nodes, codes
            are gathered within a node, and only gradients go between nodes.
        units: Globs of the names of modules that are gathered one by one, or "type:Class"; without it, the members of
            every outermost `ModuleList`, `ModuleDict` and `Sequential`: a model's blocks.
        gradients: How gradients are reduced; in their own dtype when left out, as int8 codes with
            `EightBitReduceScatter()`.
        save_distributed_checkpoint: Every process writes its shards into a folder (torch.distributed.checkpoint); else
            the first process writes one file as a single process would. Either can be loaded under the other.
        process_group_backend: Of torch.distributed; chosen by the device when left out.
        timeout: Of collectives.

    Raises:
        ValueError: From fit, where a module cannot be sharded as it is.
    """

    def __init__(
        self,
        units: list[str] | None = None,
        *,
        replicas: int = 1,
        gradients: EightBitReduceScatter | None = None,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        if replicas < 1:
            raise ValueError(f"QuantizedFSDP(replicas={replicas}): at least one copy, for example replicas=2")
        self.units, self.gradients, self.replicas = units, gradients, replicas
        self._mesh: DeviceMesh | None = None
        self._gathers: list[CodeGather | KeptGather] = []

    def setup_environment(self) -> None:
        count = self.num_nodes * self.num_processes
        if count % self.replicas:
            raise ValueError(
                f"QuantizedFSDP(replicas={self.replicas}): {count} processes do not make so many groups of one size"
            )
        self._data_parallel_size = count
        super().setup_environment()
        self._mesh = self.device_mesh["data_parallel"]
        if self.replicas > 1:
            sizes = self.replicas, count // self.replicas
            self._mesh = init_device_mesh(self.root_device.type, sizes, mesh_dim_names=("replicate", "shard"))

    def setup(self, trainer: Trainer) -> None:
        module = self.lightning_module
        assert module is not None
        self.model = self.precision_plugin.convert_module(module)  # shards keep their dtype from the beginning
        if not any(isinstance(child, FSDPModule) for child in module.modules()):
            self._shard(module)
        else:
            self._gathers = gathers_of(module)
        for loop in (trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop):
            loop.inference_mode = False  # what is made in it could never be trained with, and FSDP2 makes things once
        trainer.predict_loop.inference_mode = False
        if is_overridden("configure_model", module):
            super().setup(trainer)
        else:  # which the parent insists on, since it expects modules to shard themselves there
            module.configure_model = _nothing_to_configure  # type: ignore[method-assign]
            try:
                super().setup(trainer)
            finally:
                del module.configure_model
        for gather in self._gathers:
            gather.attach()

    def shard_frozen(self, module: nn.Module) -> None:
        """Shard a module that is no part of the one that is trained (a teacher), on its own and gathered in full."""
        self._cut(module, None)

    def _shard(self, module: LightningModule) -> None:
        assert self._mesh is not None
        ranks = self._mesh.size(self._mesh.ndim - 1)
        plan = Plan(module, ranks=ranks)
        count = self._cut(module, self.units)
        self._gathers = plan.attach(module)
        if self.gradients is not None:
            reduce_with(module, self.gradients)
        copies = f", {self.replicas} copies" if self.replicas > 1 else ""
        rank_zero_info(f"QuantizedFSDP: {count} units on {ranks} processes{copies}\n{plan.table()}")

    def _cut(self, module: nn.Module, names: list[str] | None) -> int:
        """Shard a module, and return in how many units beside what is called as a whole."""
        roots = [module]
        if isinstance(module, LightningModule):  # whose steps are called, and not its forward
            _check(module)
            roots = list(roots_of(module))
        inside = [unit for root in roots for unit in units_of(root)] if names is None else units_of(module, names)
        units = [unit for unit in inside if unit not in roots]
        assert self._mesh is not None
        shard(roots, units, self._mesh)
        return len(units)

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        if self.gradients is not None:
            assert self.lightning_module is not None
            self.gradients.begin(self.lightning_module.trainer.fit_loop.total_batch_idx)
        with finished_on_shards(self._gathers):
            return super().backward(closure_loss, optimizer, *args, **kwargs)


def _nothing_to_configure() -> None:
    """Sharded already."""


def _check(module: LightningModule) -> None:
    own = [name for name, _ in module.named_parameters(recurse=False)]
    if own:
        raise ValueError(
            f"{own[0]!r} is a parameter of {type(module).__name__} itself, whose steps run without gathering it: keep "
            "it in a submodule whose forward uses it"
        )
    if any(hasattr(parameter, "placements") for parameter in module.parameters()):
        raise ValueError(
            f"{type(module).__name__} has parameters that are DTensors already: build plain modules in "
            "configure_model, which QuantizedFSDP shards after they were converted"
        )


# Where a configuration says `strategy: qlightning.QuantizedFSDP`, Lightning looks for a registered name, in lower case.
StrategyRegistry.register("qlightning.quantizedfsdp", QuantizedFSDP, description="FSDP2 that gathers codes")
