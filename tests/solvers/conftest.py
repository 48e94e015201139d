"""Small models of every kind, converted, with calibration data."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlightning.capture import find_blocks, sites_of
from qlightning.layers.convert import convert, quantizers_of
from qlightning.solvers.moments import group_by_input
from qlightning.solvers.solver import BlockTask


class Small:
    """Makers of small models and of their data; everything is a function of seeds."""

    ids = torch.randint(32, (6, 10), generator=torch.Generator().manual_seed(0))
    images = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))

    @staticmethod
    def llama(weight: Any = "int3-g8", **options: Any) -> nn.Module:
        from transformers import AutoModelForCausalLM, LlamaConfig

        torch.manual_seed(0)
        sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
        model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_attention_heads=2, **options))
        with torch.no_grad():  # the usual initialisation is so small that attention does nothing
            for p in model.parameters():
                p.mul_(4.0 if p.dim() > 1 else 1.0)
        if weight is not None:
            convert(model, weight)
        return model

    @staticmethod
    def vit(weight: Any = "int3-g8") -> nn.Module:
        from transformers import ViTConfig, ViTForImageClassification

        torch.manual_seed(0)
        sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
        model = ViTForImageClassification(ViTConfig(**sizes, num_attention_heads=2, num_labels=4))
        if weight is not None:
            convert(model, weight)
        return model

    @staticmethod
    def convnet(weight: Any = "int3") -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 8, 3, groups=4, stride=2),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(72, 4),
        )
        if weight is not None:
            convert(model, weight)
        return model

    @classmethod
    def tokens(cls, size: int = 2) -> list[dict[str, Tensor]]:
        return [{"input_ids": part} for part in cls.ids.split(size)]

    @classmethod
    def pictures(cls, size: int = 2) -> list[dict[str, Tensor]]:
        return [{"pixel_values": part} for part in cls.images.split(size)]

    @classmethod
    def rows(cls, size: int = 2) -> list[Tensor]:
        return list(cls.images.split(size))

    @classmethod
    def logits(cls, model: nn.Module) -> Tensor:
        with torch.no_grad():
            kind = type(model).__name__
            if "Sequential" in kind:
                return model(cls.images)
            return model(**({"pixel_values": cls.images} if "ViT" in kind else {"input_ids": cls.ids})).logits

    @classmethod
    def kinds(cls) -> dict[str, Any]:
        return {
            "llama": (cls.llama, cls.tokens),
            "vit": (cls.vit, cls.pictures),
            "convnet": (cls.convnet, cls.rows),
        }

    @staticmethod
    def problem(rows: int = 6, columns: int = 16, seed: int = 0, tokens: int = 64) -> tuple[Tensor, Tensor]:
        """A weight and correlated inputs (tokens, columns), some channels much larger than others."""
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(rows, columns, generator=generator)
        mixing = torch.randn(columns, columns, generator=generator) * torch.logspace(-1, 1, columns)
        return weight, torch.randn(tokens, columns, generator=generator) @ mixing

    @staticmethod
    def task(block: nn.Module, *args: Any, **kwargs: Any) -> BlockTask:
        """A task of a block that is called with these arguments."""
        for _, quantizer in quantizers_of(block):
            quantizer.enabled = False
        block.eval().requires_grad_(False)
        groups = group_by_input(sites_of(block), lambda: block(*args, **kwargs))
        return BlockTask(block, groups, {"fp": [(args, kwargs)]}, {})

    @classmethod
    def first_layer(cls, model: nn.Module) -> BlockTask:
        """A task of the first layer of a language model."""
        (_, block), *_ = find_blocks(model).items()
        seen: list[Any] = []
        block.register_forward_pre_hook(lambda m, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
        with torch.no_grad():
            model(**cls.tokens()[0], use_cache=False)
        block._forward_pre_hooks.clear()
        args, kwargs = seen[0]
        return cls.task(block, *args, **kwargs)

    copy = staticmethod(copy.deepcopy)


@pytest.fixture(scope="session")
def small() -> type[Small]:
    return Small


@pytest.fixture(params=["llama", "vit", "convnet"])
def kind(request, small) -> Any:
    """(maker of a converted model, maker of its batches)."""
    return small.kinds()[request.param]
