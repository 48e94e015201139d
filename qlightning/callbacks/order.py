"""Which callback stands before which in a Trainer."""

from lightning.pytorch import Callback, Trainer

from qlightning.callbacks.qat import QATCallback


def qat_before(callback: Callback, trainer: Trainer) -> QATCallback:
    """The QATCallback that a callback works on, whose hooks run first.

    Args:
        callback: Of the trainer.
        trainer: Its trainer.

    Raises:
        ValueError: None stands before it.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for other in callbacks[: callbacks.index(callback)]:
        if isinstance(other, QATCallback):
            return other
    name = type(callback).__name__
    raise ValueError(
        f"{name} works on what a QATCallback before it has converted: "
        f"Trainer(callbacks=[QATCallback(weight='int4-g128'), {name}()])"
    )
