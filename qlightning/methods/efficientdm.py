"""EfficientDM: a LoRA inside the weight quantizers of a diffusion model, taught on its own sampling trajectories."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from qlightning.adapters import Adapter, LoRA
from qlightning.callbacks.phases import places
from qlightning.layers.convert import quantizers_of
from qlightning.layers.scheme import Scheme
from qlightning.methods.method import Method
from qlightning.numerics import MSE, ClippedSTE, Int, Learned, PerChannel, Quantizer
from qlightning.numerics.conditioned import StepTable
from qlightning.numerics.per_sample import PerSample


class EfficientDM(Method):
    """Low-bit fine-tuning of a diffusion model without data: QALoRA, a step per sampler step, and its own rates.

    Weights are Q(W + B A) with W frozen. Inputs have one learned step and zero point for each step of the sampler. The
    float model samples; at each step of its trajectory the quantized one learns to predict the same noise, and the
    optimizer steps once. The batches of the datamodule only say how many images there are, of what shape and class.
    Nothing else of the model trains.

    Paper: EfficientDM: Efficient Quantization-Aware Fine-Tuning of Low-Bit Diffusion Models (He et al., ICLR 2024,
    arXiv 2310.03270).

    Deviations: the frozen weight stays float, so that the module with its quantizers off is the teacher and no second
    model is held; the authors keep codes and a separate teacher. The lower end of a weight's range is learned beside
    its step, where the authors keep the zero point. Zero points are rounded in training as they are in deployment.
    Activation ranges are searched on the first `calibration` steps of the trajectory, not on all. A row of the step
    tables is found by the time step and not by counting calls, so that guidance and validation see the right one.
    Which layers have 8 bits and no LoRA (the authors' first three and last), or stay float, is said by name.

    Several processes need Trainer(strategy="ddp_find_unused_parameters_true"), since most parameters are frozen.

    Args:
        bits: Bits of weights.
        input_bits: Bits of layer inputs.
        rank: Of A and B.
        steps: Of the sampler, and of the tables.
        timesteps: Number of the model's time steps.
        eta: Noise of the DDIM sampler: 0 none, 1 as much as DDPM's.
        guidance: Scale of classifier-free guidance; 1 uses none.
        null_label: The class that means none, which guidance needs.
        eight_bit: Names (globs) of layers at 8 bits without LoRA.
        calibration: Optimizer steps in which input ranges are searched, as in QATCallback.
        weight_scale_lr: Learning rate of the steps of weights.
        input_scale_lr: Learning rate of the steps and zero points of inputs.
        rate_divisor: A layer's A and B learn at the mean of its weight's steps over this.
        adapter_lr: One learning rate for every A and B in place of that rule; None keeps the rule.
        table_rows: Rows of the step tables; None gives each step of the sampler its own, 1 one step for all.
        sampler: Where the module keeps a diffusers scheduler, whose noise the sampler takes over.
        seed: Of the trajectories' noise.
    """

    domain = "denoising"

    def __init__(
        self,
        bits: int = 4,
        input_bits: int = 4,
        *,
        rank: int = 32,
        steps: int = 100,
        timesteps: int = 1000,
        eta: float = 1.0,
        guidance: float = 1.0,
        null_label: int | None = None,
        eight_bit: Sequence[str] = (),
        calibration: int = 8,
        weight_scale_lr: float = 1e-6,
        input_scale_lr: float = 5e-4,
        rate_divisor: float = 2500.0,
        adapter_lr: float | None = None,
        table_rows: int | None = None,
        sampler: str = "process.scheduler",
        seed: int = 0,
    ) -> None:
        self.bits, self.input_bits, self.rank = bits, input_bits, rank
        self.steps, self.timesteps, self.eta = steps, timesteps, eta
        self.guidance, self.null_label, self.eight_bit = guidance, null_label, list(eight_bit)
        self.calibration, self.sampler, self.seed = calibration, sampler, seed
        self.weight_scale_lr, self.input_scale_lr, self.rate_divisor = weight_scale_lr, input_scale_lr, rate_divisor
        self.adapter_lr, self.table_rows = adapter_lr, table_rows

    def quantization(self) -> dict[str, Any]:
        adapter = LoRA(self.rank, alpha=float(self.rank))
        all_ = Scheme(self._weight(self.bits), input=self._input(self.input_bits), adapter=adapter)
        few = {name: Scheme(self._weight(8), input=self._input(8)) for name in self.eight_bit}
        return {"rules": {"*": all_, **few}, "calibration": self.calibration}

    def extras(self) -> list[Callback]:
        trajectory = TrajectoryDistillation(
            self.steps,
            eta=self.eta,
            guidance=self.guidance,
            null_label=self.null_label,
            sampler=self.sampler,
            seed=self.seed,
        )
        rates = ScaleAwareRates(
            divisor=self.rate_divisor,
            adapters=self.adapter_lr,
            weight_scales=self.weight_scale_lr,
            input_scales=self.input_scale_lr,
        )
        return [trajectory, rates]

    def _weight(self, bits: int) -> Quantizer:
        return Quantizer(Int(bits, symmetric=False), PerChannel(), scale=Learned(), gradient=ClippedSTE())

    def _input(self, bits: int) -> Quantizer:
        # 80 ranges, each a hundredth smaller, by the 2.4th power of the error
        source = MSE(steps=80, floor=0.21, power=2.4)
        table = StepTable(self.table_rows or self.steps, timesteps=self.timesteps, source=source)
        return Quantizer(Int(bits, symmetric=False), PerSample(), scale=table, gradient=ClippedSTE())


class TrajectoryDistillation(Callback):
    """Replaces the training step: at each step of the float model's trajectory, the distance of the predicted noise.

    The module is called as qlightning's Diffusion is: (noisy images, a time step each, classes or None) to noise. The
    teacher is that module with quantizers and adapters off, so everything but adapters and learned scales is frozen
    while it trains. One optimizer step is one step of the sampler; the images of a trajectory are carried from
    batch to batch and in checkpoints.

    Args:
        steps: Of the sampler.
        eta: Noise of the DDIM sampler.
        guidance: Scale of classifier-free guidance.
        null_label: The class that means none.
        sampler: Where the module keeps a diffusers scheduler.
        seed: Of the noise.
    """

    def __init__(
        self,
        steps: int = 100,
        *,
        eta: float = 1.0,
        guidance: float = 1.0,
        null_label: int | None = None,
        sampler: str = "process.scheduler",
        seed: int = 0,
    ) -> None:
        if guidance != 1 and null_label is None:
            raise ValueError(f"guidance={guidance} needs the class that means none: write for example null_label=1000")
        self.steps, self.eta, self.guidance, self.null_label = steps, eta, guidance, null_label
        self.sampler, self.seed = sampler, seed
        self.timesteps: list[int] = []
        self._images: Tensor | None = None
        self._labels: Tensor | None = None
        self._done = 0  # steps of all trajectories
        self._frozen: list[nn.Parameter] = []
        self._module: LightningModule | None = None
        self._own_step: Any = None  # what torch.compile or a user has put on the instance
        self._ddim: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and not trainer.global_step:  # what a resumed run goes on with is loaded after this
            self._images, self._labels, self._done = None, None, 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not pl_module.automatic_optimization or trainer.accumulate_grad_batches != 1:
            raise ValueError(
                "a trajectory takes one optimizer step at each step of the sampler: leave the optimization to "
                "Lightning (automatic_optimization=True) and write Trainer(accumulate_grad_batches=1)"
            )
        self._ddim = self._sampler(pl_module)
        self.timesteps = [int(t) for t in self._ddim.timesteps]
        trained = {id(p) for _, quantizer in quantizers_of(pl_module) for p in quantizer.parameters()}
        trained |= {id(p) for adapter in _adapters(pl_module) for p in adapter.parameters()}
        self._frozen = [p for p in pl_module.parameters() if p.requires_grad and id(p) not in trained]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        original = pl_module.training_step

        @functools.wraps(original)  # Lightning looks at the signature
        def training_step(batch: Any, *args: Any, **kwargs: Any) -> Tensor:
            return self._step(trainer, pl_module, batch)

        self._module, self._own_step = pl_module, vars(pl_module).get("training_step")
        pl_module.training_step = training_step  # type: ignore[method-assign]

    def _sampler(self, pl_module: LightningModule) -> Any:
        from diffusers import DDIMScheduler

        found: Any = pl_module
        for name in self.sampler.split("."):
            found = getattr(found, name, None)
        if not hasattr(found, "config"):
            raise ValueError(
                f"{type(pl_module).__name__} keeps no diffusers scheduler as {self.sampler!r}: say where it is, for "
                "example sampler='noise_scheduler'"
            )
        ddim = DDIMScheduler.from_config(found.config, clip_sample=False)
        ddim.set_timesteps(self.steps)
        return ddim

    def _step(self, trainer: Trainer, pl_module: LightningModule, batch: Mapping[str, Tensor]) -> Tensor:
        k = self._done % self.steps
        generator = torch.Generator().manual_seed(
            self.seed + 1_000_003 * (trainer.global_rank + 1) + 7_919 * self._done
        )
        if k == 0 or self._images is None:
            self._images = torch.randn(batch["image"].shape, generator=generator)
            self._labels = batch.get("label")
        images, timestep = self._images.to(pl_module.device), self.timesteps[k]
        with float_model(pl_module):
            wanted = self._noise(pl_module, images, timestep)
        loss = F.mse_loss(self._noise(pl_module, images, timestep).float(), wanted.float(), reduction="sum")
        moved = self._ddim.step(wanted, timestep, images, eta=self.eta, generator=generator)
        self._images, self._done = moved.prev_sample.detach(), self._done + 1
        pl_module.log("trajectory_loss", loss.detach() / len(images))
        return loss

    def _noise(self, pl_module: LightningModule, images: Tensor, timestep: int) -> Tensor:
        """The predicted noise, after guidance."""
        labels = None if self._labels is None else self._labels.to(images.device)
        steps = torch.full((len(images),), timestep, device=images.device)
        if self.guidance == 1 or labels is None:
            predicted: Tensor = pl_module(images, steps, labels)
            return predicted
        assert self.null_label is not None
        both = torch.cat([torch.full_like(labels, self.null_label), labels])
        without, given = pl_module(images.repeat(2, 1, 1, 1), steps.repeat(2), both).chunk(2)
        guided: Tensor = without + self.guidance * (given - without)
        return guided

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._let_go()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._let_go()

    def _let_go(self) -> None:
        if self._module is not None:
            del self._module.training_step
            if self._own_step is not None:
                self._module.training_step = self._own_step  # type: ignore[method-assign]
            self._module = self._own_step = None
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = []

    def state_dict(self) -> dict[str, Any]:
        return {"images": self._images, "labels": self._labels, "done": self._done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._images, self._labels, self._done = state_dict["images"], state_dict["labels"], state_dict["done"]


class ScaleAwareRates(Callback):
    """Learning rates by what they move: a layer's A and B at the mean of its weight's steps over a constant.

    The course of a learning rate schedule stays; only the height changes. No weight decay.

    Args:
        divisor: The constant.
        adapters: One learning rate for every A and B in place of the rule.
        weight_scales: Of the learned scales of weights.
        input_scales: Of those of inputs and outputs.
    """

    def __init__(
        self,
        *,
        divisor: float = 2500.0,
        adapters: float | None = None,
        weight_scales: float = 1e-6,
        input_scales: float = 5e-4,
    ) -> None:
        self.divisor, self.adapters = divisor, adapters
        self.weight_scales, self.input_scales = weight_scales, input_scales

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rates: dict[nn.Parameter, float] = {}
        for place in places(pl_module):
            height = self.weight_scales if place.is_weight else self.input_scales
            rates |= dict.fromkeys(place.quantizer.learned(), height)
            if place.is_weight and isinstance(adapter := place.layer._modules.get("adapter"), Adapter):
                grid = place.quantizer.grid(place.layer.effective(place.prefix))
                rule = float(grid[0].detach().mean()) / self.divisor
                rates |= dict.fromkeys(adapter.parameters(), rule if self.adapters is None else self.adapters)
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        for optimizer in trainer.optimizers:
            set_rates(optimizer, schedulers, rates)


def set_rates(optimizer: Optimizer, schedulers: Sequence[Any], rates: Mapping[nn.Parameter, float]) -> None:
    """Move parameters into groups of their own by learning rate, in place, and let schedulers know.

    Args:
        optimizer: The optimizer, before its state is restored.
        schedulers: Learning rate schedulers of the run; those of other optimizers are left alone.
        rates: Peak learning rate by parameter.
    """
    for index, group in enumerate(list(optimizer.param_groups)):
        mine = [p for p in group["params"] if p in rates]
        group["params"] = [p for p in group["params"] if p not in rates]
        course = group["lr"] / peak if (peak := group.get("initial_lr", group["lr"])) else 1.0
        for rate in dict.fromkeys(rates[p] for p in mine):
            options = {name: value for name, value in group.items() if name != "params"}
            options |= {"lr": rate * course, "weight_decay": 0.0} | (
                {"initial_lr": rate} if "initial_lr" in group else {}
            )
            optimizer.add_param_group({**options, "params": [p for p in mine if rates[p] == rate]})
            for scheduler in schedulers:
                if scheduler.optimizer is optimizer:
                    _follow(scheduler, index, rate, rate * course)


def _follow(scheduler: Any, like: int, peak: float, now: float) -> None:
    """Give a scheduler's lists an entry for a new group."""
    for child in getattr(scheduler, "_schedulers", []):
        _follow(child, like, peak, now)
    for name, value in (("base_lrs", peak), ("_last_lr", now)):
        if isinstance(values := getattr(scheduler, name, None), list):
            values.append(value)
    if isinstance(courses := getattr(scheduler, "lr_lambdas", None), list):
        courses.append(courses[like])


@contextmanager
def float_model(module: nn.Module) -> Iterator[None]:
    """The converted module as the float model it was: quantizers and adapters off, in eval mode, without gradients."""
    quantizers = [quantizer for _, quantizer in quantizers_of(module)]
    adapters, training = _adapters(module), [child for child in module.modules() if child.training]
    before = [(quantizer.enabled, quantizer.observing) for quantizer in quantizers]

    def put_back() -> None:
        for quantizer, (enabled, observing) in zip(quantizers, before, strict=True):
            quantizer.enabled, quantizer.observing = enabled, observing
        for adapter in adapters:
            adapter.acting = True
        for child in training:
            child.training = True

    for quantizer in quantizers:
        quantizer.enabled = quantizer.observing = False
    for adapter in adapters:
        adapter.acting = False
    for child in training:
        child.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        put_back()


def _adapters(module: nn.Module) -> list[Adapter]:
    return [child for child in module.modules() if isinstance(child, Adapter)]
