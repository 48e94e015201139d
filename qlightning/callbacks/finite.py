"""NaN and infinity in a run: noticed before the optimizer steps, named by layer, and handled as the user chose."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from qlightning.callbacks.first_place import first_place
from qlightning.callbacks.phases import learned_beside, places
from qlightning.callbacks.policies import Before, Policy, Raise
from qlightning.callbacks.qat import QATCallback
from qlightning.callbacks.ranks import from_all


class FiniteCallback(Callback):
    """Watches the loss, the gradients and the scales of every step; what is not finite never reaches the weights.

    Before an optimizer steps, one check over all of them, with one answer for the host to wait for. A GradScaler
    (16-mixed) leaves out such steps itself, and only scales are watched beside it. Scales that have shrunk or grown by
    `limit` since they were first seen are reported, each once.

    Stands after the QATCallback: `Trainer(callbacks=[QATCallback(...), FiniteCallback(SkipStep())])`.

    Args:
        policy: What happens: `Raise()`, `SkipStep()` or `RestoreLastGood()`.
        limit: By what factor a scale may shrink or grow before it is reported as collapsed or exploded.

    Raises:
        ValueError: As the policy says; the message names the layers.
    """

    def __init__(self, policy: Policy | None = None, limit: float = 1000.0) -> None:
        if not limit > 1:
            raise ValueError(f"limit={limit}: above 1, for example FiniteCallback(limit=1000.0)")
        self.policy, self.limit = policy or Raise(), limit
        self._losses: list[Tensor] = []
        self._before: Before | None = None
        self._batch: tuple[Any, int] | None = None
        self._first: dict[str, Tensor] = {}
        self._reported: list[str] = []
        self._left_out = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(other, QATCallback) for other in callbacks[callbacks.index(self) :]):
            raise ValueError(
                "FiniteCallback must see the step as QATCallback has begun it: put it behind, "
                "Trainer(callbacks=[QATCallback(...), FiniteCallback(...)])"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.policy.begin(trainer, pl_module)
        self._losses, self._before, self._left_out = [], None, False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._batch = batch, batch_idx
        if self._before is None:  # the first batch since the last step
            self._before = Before.of(trainer, pl_module)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._losses.append(loss.detach())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        gradients = {} if scaled else dict(_gradients(pl_module, optimizer))
        scales = dict(_scales(pl_module))
        if scaled:
            self._losses = []
        finite, within = self._check(gradients, scales, trainer)
        if finite and not within:
            self._report(scales, trainer)
        before = self._before or Before.of(trainer, pl_module)
        if finite:
            self.policy.good(trainer, pl_module, before)
        else:
            story = self._story(trainer, pl_module, gradients, scales)
            try:
                self.policy.bad(story)
            except ValueError as error:  # the run ends, so there is time to look
                raise ValueError(f"{error}{self._first_place(trainer, pl_module, before)}") from None
            self._leave_out(optimizer, pl_module, before, scaled=scaled)
        self._losses, self._before = [], None

    def _first_place(self, trainer: Trainer, module: LightningModule, before: Before) -> str:
        if self._batch is None:
            return ""
        place = first_place(trainer, module, *self._batch)
        before.put_back(module)
        return f". {place}" if place else ""

    def _leave_out(self, optimizer: Optimizer, module: LightningModule, before: Before, *, scaled: bool) -> None:
        for group in () if scaled else optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None  # no optimizer moves what has none, nor what it remembers of it
        before.put_back(module)  # running statistics and observers forget the batch
        self._left_out = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._batch = None
        if self._left_out:
            self._left_out = False
            self.policy.left_out(trainer, pl_module)

    @torch.no_grad()
    def _check(self, gradients: dict[str, Tensor], scales: dict[str, Tensor], trainer: Trainer) -> tuple[bool, bool]:
        """Whether everything is finite, and every scale near what it was; the one place where the host waits."""
        held = [tensor for tensor in (*gradients.values(), *scales.values()) if tensor.numel()]
        largest = [*self._losses, *_norms(held, torch.inf)]
        ones = torch.ones((), dtype=torch.bool, device=_device(largest, trainer))
        finite = within = ones
        if largest:
            values = torch.stack([value.float().reshape(()).to(ones.device) for value in largest])
            finite = values.isfinite().all()
        now = {name: _range(scale).to(ones.device) for name, scale in scales.items() if name not in self._reported}
        if now:
            self._remember(now, trainer)
            moved = torch.stack(list(now.values())) / torch.stack([self._first[name].to(ones.device) for name in now])
            within = ((moved > 1 / self.limit) & (moved < self.limit)).all()
        answer = torch.stack([finite, within])
        if trainer.world_size > 1:  # every process does the same
            answer = trainer.strategy.reduce((~answer).float(), reduce_op="sum") == 0  # type: ignore[union-attr,operator]
        all_finite, all_within = answer.tolist()
        return all_finite, all_within

    def _remember(self, now: dict[str, Tensor], trainer: Trainer) -> None:
        """Where scales begin, those of which every process has a part in all of them."""
        if not (new := [name for name in now if name not in self._first]):
            return
        sign = torch.tensor([-1.0, 1.0], device=now[new[0]].device)
        ends = torch.stack([now[name] for name in new]) * sign
        if trainer.world_size > 1:
            ends = trainer.strategy.reduce(ends, reduce_op="max")  # type: ignore[assignment]
        self._first |= dict(zip(new, (ends * sign).unbind(), strict=True))

    def _report(self, scales: dict[str, Tensor], trainer: Trainer) -> None:
        own = []
        for name, scale in scales.items():
            low, high = (_range(scale) / self._first[name].to(scale.device)).tolist()
            if name not in self._reported and not (low > 1 / self.limit and high < self.limit):
                own.append((name, low, high))
        for name, low, high in itertools.chain(*from_all(trainer, own)):
            if name in self._reported:
                continue
            self._reported.append(name)
            what = "collapsed" if not low > 1 / self.limit else "exploded"
            rank_zero_warn(
                f"FiniteCallback: the scale of {name} has {what}: its smallest value is {low:.3g} of what it was, its "
                f"largest {high:.3g}; take a smaller rate for scales, QATCallback(scale_lr=0.01), or a measured scale"
            )

    def _story(
        self, trainer: Trainer, module: LightningModule, gradients: dict[str, Tensor], scales: dict[str, Tensor]
    ) -> str:
        """What is not finite anywhere, which every process says alike."""
        beside = learned_beside(module)
        values = {name: _local(p.detach()) for name, p in module.named_parameters() if p not in beside}
        lists: dict[str, dict[Any, Tensor]] = {"the loss": dict(enumerate(self._losses)), "weight": values}
        lists |= {"scale": scales, "gradient": gradients}
        own = {what: [name for name, tensor in tensors.items() if _broken(tensor)] for what, tensors in lists.items()}
        everywhere = from_all(trainer, own)
        said = []
        for what, tensors in lists.items():
            where = [number for number, found in enumerate(everywhere) if found[what]]
            names = [str(name) for name in tensors if any(name in found[what] for found in everywhere)]
            if where:
                text = what if what == "the loss" else f"{what} of {_listed(names, backward=what == 'gradient')}"
                alone = 0 < len(where) < len(everywhere)
                said.append(f"{text} (in process {', '.join(map(str, where))})" if alone else text)
        return f"step {trainer.global_step}: not finite: {'; '.join(said)}"

    def state_dict(self) -> dict[str, Any]:
        return {"policy": self.policy.state_dict(), "first": self._first, "reported": self._reported}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.policy.load_state_dict(state_dict["policy"])
        self._first, self._reported = dict(state_dict["first"]), list(state_dict["reported"])


def _gradients(module: LightningModule, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    mine = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in module.named_parameters():
        if parameter in mine and parameter.grad is not None:
            yield name, _local(parameter.grad)


def _scales(module: LightningModule) -> Iterator[tuple[str, Tensor]]:
    """What gradient descent or observation moves, of every quantizer that acts."""
    for place in places(module):
        if place.quantizer.enabled:
            for name, scale in place.quantizer.scale.named_parameters():
                yield place.name if name == "value" else f"{place.name} ({name})", _local(scale.detach())


def _local(tensor: Tensor) -> Tensor:
    """This process's part of it, dense; it may have none."""
    to_local: Callable[[], Tensor] | None = getattr(tensor, "to_local", None)
    tensor = tensor if to_local is None else to_local()
    return tensor.coalesce().values() if tensor.is_sparse else tensor


def _device(tensors: list[Tensor], trainer: Trainer) -> torch.device:
    return tensors[0].device if tensors else trainer.strategy.root_device


def _norms(tensors: list[Tensor], order: float) -> list[Tensor]:
    return list(torch._foreach_norm(tensors, order)) if tensors else []


def _range(scale: Tensor) -> Tensor:
    if not scale.numel():
        return torch.tensor([torch.inf, 0.0], device=scale.device)
    return torch.stack([scale.abs().min(), scale.abs().max()]).float()


def _broken(tensor: Tensor) -> bool:
    return not bool(torch.isfinite(tensor).all())


def _listed(names: list[str], *, backward: bool) -> str:
    """The first of them; gradients are made from the loss on, and what broke them lies there."""
    shown = names[::-1][:3] if backward else names[:3]
    rest = len(names) - len(shown)
    return ", ".join(shown) + (f" and {rest} more{', nearest the loss first' if backward else ''}" if rest else "")
