"""Plain: the weights in float, on the grid they were trained on, for any runtime that reads safetensors."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qlightning.export import pretrained
from qlightning.export.artifact import Shards, read_tensors
from qlightning.export.target import EXACT, TRANSFORM, Plan, Target, Tolerance
from qlightning.export.trained import Layer, Trained, Weight
from qlightning.layers.convert import restore


class Plain(Target):
    """Safetensors of the dequantized weights: a model folder of transformers or diffusers, else a state dict.

    A transformers or diffusers model loads with `from_pretrained`; any other module's file holds the state dict of the
    plain module, as `qlightning.restore` leaves it.

    Args:
        shard_bytes: Size beyond which a second file is begun.
    """

    name = "plain"
    takes_adapters = True

    def __init__(self, *, shard_bytes: int = 5 * 10**9) -> None:
        self.shard_bytes = shard_bytes

    def misfit(self, weight: Weight, dtype: torch.dtype) -> str | None:
        return None

    def misplaced(self, layer: Layer, placement: str, dtype: torch.dtype) -> str | None:
        if placement == TRANSFORM:
            return "a plain model has nothing but weights"
        return "a plain model computes with float activations"

    def write(self, plan: Plan, folder: Path) -> None:
        names = pretrained.Names(plan.trained)
        shards = Shards(folder, stem=names.stem, shard_bytes=self.shard_bytes)
        for weight in plan.packed():
            names.add(shards, weight.name, lambda weight=weight: weight.values(plan.dtype))  # type: ignore[misc]
        for name, tensor in plan.dense():
            names.add(shards, name, lambda tensor=tensor: tensor)  # type: ignore[misc]
        shards.close()
        pretrained.write_config(plan.trained, folder, dtype=plan.dtype)

    def load(self, folder: Path, trained: Trained) -> Callable[..., Any]:
        if pretrained.is_pretrained(trained):
            return pretrained.load(folder, trained)
        module = restore(copy.deepcopy(trained.model))
        tensors = dict(read_tensors(folder))
        module.to(next(t.dtype for t in tensors.values() if t.is_floating_point()))
        module.load_state_dict(tensors)
        return module.eval()

    def tolerance(self, plan: Plan) -> Tolerance:
        return EXACT if plan.dtype == plan.trained.dtype else rounded(plan)


def rounded(plan: Plan) -> Tolerance:
    """What may differ where the artifact computes in another dtype than the trained model."""
    return Tolerance(
        None, 25.0, 35.0, f"trained in {plan.trained.dtype}, exported in {plan.dtype}".replace("torch.", "")
    )
