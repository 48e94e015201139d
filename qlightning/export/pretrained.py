"""Model folders of transformers and diffusers: names of tensors in files, the config, and loading them back."""

import copy
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlightning.export.artifact import Shards
from qlightning.export.trained import Trained
from qlightning.layers.layer import Twin, plain_class

_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "preprocessor_config.json", "processor_config.json"),
)


def is_pretrained(trained: Trained) -> bool:
    """Whether the exported model is one of transformers or diffusers, which has a folder layout of its own."""
    return is_transformers(trained) or is_diffusers(trained)


def is_transformers(trained: Trained) -> bool:
    """Whether the exported model is one of transformers."""
    return trained.config is not None


def is_diffusers(trained: Trained) -> bool:
    """Whether the exported model is one of diffusers."""
    return callable(getattr(trained.model, "save_config", None))


def class_of(model: nn.Module) -> type[Any]:
    """The class of a model as its library knows it."""
    return plain_class(model) if isinstance(model, Twin) else type(model)


class Names:
    """What tensors are called in the files of a model folder, which need not be their names in the state dict.

    transformers renames some and takes fused experts apart; of tied weights only the first name is written.

    Args:
        trained: The model.
        untie: Write tied weights under all their names.

    Attributes:
        stem: Name of the weight files without ending.
    """

    def __init__(self, trained: Trained, *, untie: bool = False) -> None:
        self.model = trained.model
        self.stem = "diffusion_pytorch_model" if is_diffusers(trained) else "model"
        self._skipped = frozenset[str]() if untie else _tied(trained)
        self._renames = is_transformers(trained) and self._anything_renamed()

    def _anything_renamed(self) -> bool:
        names = {name: torch.empty(p.shape, device="meta") for name, p in self.model.named_parameters()}
        return set(self._revert(names)) != set(names)

    def _revert(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        reverted: dict[str, Tensor] = revert_weight_conversion(self.model, tensors)
        return reverted

    def written(self, name: str) -> bool:
        """Whether a tensor has a place of its own in the files."""
        return name not in self._skipped

    def in_files(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by their names in files. One tensor may become several."""
        kept = {name: tensor for name, tensor in tensors.items() if self.written(name)}
        return self._revert(kept) if self._renames and kept else kept

    def of(self, name: str) -> str:
        """The name in files of a parameter that is not taken apart.

        Raises:
            ValueError: It is taken apart.
        """
        if not self._renames:
            return name
        names = list(self._revert({name: torch.empty(self.model.get_parameter(name).shape, device="meta")}))
        if len(names) != 1:
            raise ValueError(f"{name} is several tensors in files: {', '.join(names)}")
        return names[0]

    def taken_apart(self) -> list[str]:
        """Names of the parameters that are several tensors in files."""
        if not self._renames:
            return []
        shapes = {name: p.shape for name, p in self.model.named_parameters() if p.dim() > 2}
        return [
            name for name, shape in shapes.items() if len(self._revert({name: torch.empty(shape, device="meta")})) > 1
        ]

    def add(self, shards: Shards, name: str, make: Callable[[], Tensor]) -> None:
        """Write one tensor, made only if it has a place in the files."""
        if self.written(name):
            for file_name, tensor in self.in_files({name: make()}).items():
                shards.add(file_name, tensor)


def _tied(trained: Trained) -> frozenset[str]:
    """Further names of tied weights, which the model's own library restores when it loads."""
    if not is_transformers(trained):
        return frozenset()
    return frozenset(getattr(trained.model, "all_tied_weights_keys", None) or ()) & frozenset(trained.tied())


def write_config(
    trained: Trained,
    folder: Path,
    *,
    dtype: torch.dtype,
    quantization: dict[str, Any] | None = None,
    untie: bool = False,
) -> None:
    """Write config.json and what else describes the model; nothing for a model that has no config.

    Args:
        trained: The model.
        folder: Where to.
        dtype: In which the artifact computes.
        quantization: The `quantization_config` of transformers.
        untie: Say that embedding and head are two weights.
    """
    if is_transformers(trained):
        config = copy.deepcopy(trained.config)
        config.dtype = str(dtype).removeprefix("torch.")
        config.architectures = [class_of(trained.model).__name__]
        if untie:
            config.tie_word_embeddings = False
        if quantization is not None:
            config.quantization_config = quantization
        config.save_pretrained(folder)
        if trained.model.can_generate():
            trained.model.generation_config.save_pretrained(folder)
    elif is_diffusers(trained):
        trained.model.save_config(folder)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the files of a tokenizer (and image processor), and nothing else, beside the model.

    Raises:
        ValueError: There are none in `source`.
    """
    files = [path for name in _TOKENIZER if (path := source / name).is_file()]
    if not files:
        raise ValueError(f"tokenizer={str(source)!r} has no tokenizer in it, such as a {_TOKENIZER[0]}")
    for path in files:
        shutil.copyfile(path, folder / path.name)


def load(folder: Path, trained: Trained, *, cls: type[Any] | None = None, **options: Any) -> nn.Module:
    """The model of a folder, by `from_pretrained`.

    Args:
        folder: The model folder.
        trained: What it was made from: its class and its choice of attention function.
        cls: Another class that computes the same.
        **options: Handed on.

    Raises:
        ValueError: The folder lacks tensors of the model or has others.
    """
    cls = cls or class_of(trained.model)
    if is_diffusers(trained):
        dtype = options.pop("dtype", trained.dtype)
        model: nn.Module = cls.from_pretrained(str(folder), torch_dtype=dtype, **options)
        return model.eval()
    attention = trained.config._attn_implementation
    model, info = cls.from_pretrained(
        str(folder), **{"dtype": "auto", "attn_implementation": attention, "output_loading_info": True, **options}
    )
    wrong = {what: sorted(info[what]) for what in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[what]}
    if wrong:
        raise ValueError(f"{folder} does not hold this model: {wrong}")
    return model.eval()
