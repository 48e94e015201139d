"""What is run through both models: held-out batches of the run's own data, or random inputs from a seed."""

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from qlightning.export.pretrained import is_diffusers, is_transformers
from qlightning.export.trained import Trained

TOKENS = 32


class Call(NamedTuple):
    """The arguments of one call of the exported model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Inputs(NamedTuple):
    """Calls, and what they are in words."""

    calls: list[Call]
    what: str


def held_out(trained: Trained, data: LightningDataModule | Iterable[Any], *, batches: int = 2) -> Inputs:
    """The calls that the module makes of its model for held-out batches.

    Args:
        trained: The model, in its LightningModule.
        data: A datamodule, whose validation batches are taken, or batches.
        batches: How many.

    Raises:
        ValueError: There are no batches, or the module's steps do not call the model.
    """
    if isinstance(data, LightningDataModule):
        what, rows = f"validation batches of {type(data).__name__}", _validation(data)
    else:
        what, rows = "held-out batches", data
    taken = list(islice(rows, batches))
    if not taken:
        raise ValueError("data has no batches: write data=datamodule with validation data, or data=[batch]")
    calls = [_captured(trained, batch, index) for index, batch in enumerate(taken)]
    return Inputs(calls, f"{len(calls)} {what}")


def _validation(data: LightningDataModule) -> Iterable[Any]:
    data.prepare_data()
    data.setup("validate")
    loaders = data.val_dataloader()
    first: Iterable[Any] = loaders[0] if isinstance(loaders, list | tuple) else loaders
    return first


class _Reached(Exception):
    """The step has come to the model."""


def _captured(trained: Trained, batch: Any, index: int) -> Call:
    """The first call of the exported model in the module's own step."""
    module, found = trained.module, []

    def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(Call(args, dict(kwargs)))
        raise _Reached

    handle = trained.model.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        with torch.no_grad():
            _step(module, batch, index)
    except _Reached:
        return found[0]
    finally:
        handle.remove()
    raise ValueError(
        f"{type(module).__name__} does not call its model through forward in predict_step or validation_step, so "
        "held-out batches cannot be run through the artifact; write self(x), or give no data for random inputs"
    )


def _step(module: nn.Module, batch: Any, index: int) -> Any:
    if not isinstance(module, LightningModule):
        return module(**batch) if isinstance(batch, Mapping) else module(batch)
    for step in ("predict_step", "validation_step", "test_step", "training_step"):
        if is_overridden(step, module):
            return getattr(module, step)(batch, index)
    return module(batch)


def random_inputs(trained: Trained, *, batches: int = 2, seed: int = 0) -> Inputs:
    """Random token ids or images of the shape that the model's config says, or the module's `example_input_array`.

    Raises:
        ValueError: What the model takes cannot be told.
    """
    generator = torch.Generator().manual_seed(seed)
    what = f"{batches} batches of random inputs (seed {seed})"
    if is_transformers(trained):
        return Inputs([Call((), _for_transformers(trained, generator)) for _ in range(batches)], what)
    if is_diffusers(trained):
        return Inputs([Call(*_for_diffusers(trained, generator)) for _ in range(batches)], what)
    example = getattr(trained.module, "example_input_array", None)
    if example is None:
        raise ValueError(
            f"what {type(trained.module).__name__} takes is not known: write data=datamodule or data=[batch], or set "
            "self.example_input_array"
        )
    if isinstance(example, Mapping):
        return Inputs([Call((), dict(example))], "the module's example_input_array")
    return Inputs([Call(example if isinstance(example, tuple) else (example,), {})], "the module's example_input_array")


def _for_transformers(trained: Trained, generator: torch.Generator) -> dict[str, Any]:
    config, name = trained.config, trained.model.main_input_name
    if name == "pixel_values":
        size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        return {name: _normal((2, config.num_channels, size, size), trained, generator)}
    if name != "input_ids":
        raise ValueError(f"random {name} are not known: write data=datamodule or data=[batch]")
    text = config.get_text_config()
    length = min(TOKENS, getattr(text, "max_position_embeddings", TOKENS))
    ids = torch.randint(text.vocab_size, (2, length), generator=generator)
    return {name: ids, "use_cache": False} if hasattr(text, "use_cache") else {name: ids}


def _for_diffusers(trained: Trained, generator: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
    config = trained.model.config
    size = config["sample_size"] if isinstance(config["sample_size"], int) else config["sample_size"][0]
    sample = _normal((2, config["in_channels"], size, size), trained, generator)
    classes = config.get("num_class_embeds") or config.get("num_embeds_ada_norm")
    labels = {"class_labels": torch.randint(classes, (2,), generator=generator)} if classes else {}
    return (sample, torch.randint(1000, (2,), generator=generator)), labels


def _normal(shape: tuple[int, ...], trained: Trained, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator).to(trained.dtype)
