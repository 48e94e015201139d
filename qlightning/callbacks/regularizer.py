"""RegularizerCallback: a penalty on what chosen layers give, added to the loss of any LightningModule."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from qlightning.callbacks.extra_loss import ExtraLoss
from qlightning.losses.kurtosis import Kurtosis
from qlightning.losses.loss import Penalty
from qlightning.losses.taps import Site, Taps, sites


class RegularizerCallback(ExtraLoss):
    """Adds `weight` times the sum over layers of a penalty on their outputs, by default their kurtosis.

    Example::

        trainer = Trainer(callbacks=[RegularizerCallback("type:Linear", weight=1e-5)])

    It composes with `QATCallback` and with other callbacks of its kind, in any order. A layer called several times in
    a step counts as often. Several processes: each takes the penalty of its own tokens, and gradients are averaged.

    Args:
        targets: Which outputs, by globs on dotted names or any tail of them ("layers.*.mlp.down_proj", where "*" is
            any text without a dot), or "type:Linear" for a class. A suffix ":key" picks from a tuple or mapping.
        weight: What the sum of the penalties is multiplied by.
        penalty: The penalty of one output; `Kurtosis()`, a sum over tokens, when not given.
        name: Under which the sum, before `weight`, is logged.

    Raises:
        ValueError: From fit, if a pattern names no submodule, or an output has no gradient.
    """

    def __init__(
        self,
        targets: str | list[str],
        *,
        weight: float,
        penalty: Penalty | None = None,
        name: str = "kurtosis",
    ) -> None:
        super().__init__(weight=weight, name=name)
        self.targets: Sequence[str] = [targets] if isinstance(targets, str) else list(targets)
        if not self.targets:
            raise ValueError("targets=[] names no layer; write for example RegularizerCallback('type:Linear', ...)")
        self.penalty = penalty if penalty is not None else Kurtosis()
        self._sites: list[Site] = []

    def prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = {(site.name, site.key): site for pattern in self.targets for site in sites(pl_module, pattern)}
        self._sites = list(found.values())

    @contextmanager
    def watch(
        self, trainer: Trainer, pl_module: LightningModule, arguments: tuple[Any, ...], options: Mapping[str, Any]
    ) -> Iterator[Callable[[], Tensor]]:
        with Taps(self._sites) as taps:
            yield lambda: self._sum(taps)

    def _sum(self, taps: Taps) -> Tensor:
        penalties = [self.penalty(y) for site in self._sites for y in taps.outputs(site, trained=True)]
        total = penalties[0]
        for penalty in penalties[1:]:
            total = total + penalty
        return total

    def release(self) -> None:
        self._sites = []
