"""AdamW under a learning rate schedule: the optimizer of every task here."""

from collections.abc import Sequence

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from qlightning.schedules.learning_rate import Schedule


def adamw(
    module: LightningModule, schedule: Schedule, *, lr: float, betas: Sequence[float], weight_decay: float
) -> OptimizerLRSchedulerConfig:
    """What `configure_optimizers` returns: AdamW over all that is trainable, and its schedule, stepped every step.

    Weight decay acts on matrices (two dimensions and more); biases and norm scales have none.

    Args:
        module: The task, attached to a Trainer, which knows the run's length.
        schedule: Factor of the learning rate over the run.
        lr: Peak learning rate.
        betas: AdamW's two averaging factors.
        weight_decay: Decay per step, multiplied by the learning rate.
    """
    trainable = [p for p in module.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError(f"{type(module).__name__} has no trainable parameter: leave some with requires_grad=True")
    decayed = {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay}
    plain = {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0}
    groups = [group for group in (decayed, plain) if group["params"]]
    optimizer = AdamW(groups, lr=lr, betas=(betas[0], betas[1]))
    total = module.trainer.estimated_stepping_batches

    # a plain function, because LambdaLR writes the attributes of any other callable into the checkpoint and would bring
    # the old schedule back on resume
    def factor(step: int) -> float:
        return schedule.factor(step, total)

    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}
