"""What is trained: models of well-known shapes with random weights, and one batch."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

Size = Literal["llama-10m", "llama-100m", "llama-1b", "llama-7b", "llama-8b", "vit-b", "unet"]

_LLAMAS: dict[str, dict[str, int]] = {
    "llama-10m": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "vocab_size": 4096},
    "llama-100m": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "vocab_size": 32000},
    "llama-1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128256},
    "llama-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000},
    "llama-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256},
}
_HEADS = {"llama-10m": (8, 8), "llama-100m": (12, 12), "llama-1b": (32, 8), "llama-7b": (32, 32), "llama-8b": (32, 8)}


class Workload(NamedTuple):
    """A model with a batch.

    Attributes:
        name: Which, with the tokens or pictures of a step.
        model: With random weights, in train mode.
        inputs: Keyword arguments of a call.
        loss: From what the call returns.
    """

    name: str
    model: nn.Module
    inputs: Mapping[str, Any]
    loss: Callable[[Any], Tensor]


def workload(
    size: Size,
    *,
    tokens: int = 1024,
    length: int = 256,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    layers: int | None = None,
) -> Workload:
    """A model of a size, and a batch of random data.

    Args:
        size: The shape. "llama-1b" and "llama-8b" are Llama 3's, "llama-7b" is Llama 2's, "vit-b" ViT-B/16 on pictures
            of 224, "unet" the 35 M parameter DDPM network for CIFAR-10.
        tokens: Of a step; pictures have 197 (ViT) or count 64 (UNet).
        length: Tokens of a sequence.
        device: Where it is trained.
        dtype: Of its weights.
        layers: Fewer layers (of a Llama or ViT) than the shape has, where the machine is small.

    Raises:
        ValueError: There is no such size.
    """
    torch.manual_seed(0)
    with torch.device(device):  # where random weights are drawn in the time that a step takes
        if size in _LLAMAS:
            model = _llama(size, length, layers, dtype)
            shape = max(1, tokens // length), min(length, tokens)
            ids = torch.randint(_LLAMAS[size]["vocab_size"], shape)
            inputs: dict[str, Any] = {"input_ids": ids, "labels": ids}
        elif size == "vit-b":
            model, pictures = _vit(layers), max(1, tokens // 197)
            model.to(dtype)
            inputs = {"pixel_values": torch.randn(pictures, 3, 224, 224, dtype=dtype)}
            inputs["labels"] = torch.randint(2, (pictures,))
        elif size == "unet":
            model, pictures = _unet(), max(1, tokens // 64)
            model.to(dtype)
            inputs = {"sample": torch.randn(pictures, 3, 32, 32, dtype=dtype)}
            inputs["timestep"] = torch.randint(1000, (pictures,))
        else:
            raise ValueError(f"size={size!r}: there are {', '.join([*_LLAMAS, 'vit-b', 'unet'])}")
    return Workload(f"{size}, {tokens} tokens", model.train(), inputs, _square if size == "unet" else _own_loss)


def _llama(size: str, length: int, layers: int | None, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModelForCausalLM, LlamaConfig

    heads, groups = _HEADS[size]
    shape: dict[str, Any] = {**_LLAMAS[size], **({} if layers is None else {"num_hidden_layers": layers})}
    config = LlamaConfig(
        **shape,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=length,
        use_cache=False,
        tie_word_embeddings=False,
    )
    model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model


def _vit(layers: int | None) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig()
    config.num_hidden_layers = layers or config.num_hidden_layers
    return ViTForImageClassification(config)


def _unet() -> nn.Module:
    from diffusers import UNet2DModel

    return UNet2DModel(  # type: ignore[return-value]
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )


def _own_loss(output: Any) -> Tensor:
    loss: Tensor = output.loss
    return loss


def _square(output: Any) -> Tensor:
    loss: Tensor = output.sample.square().mean()
    return loss


def fitting(device: torch.device, tokens: int) -> Size:
    """The largest size that trains within a device's memory beside a copy of its gradients, in bfloat16 on a GPU.

    On a CPU, the smallest: what is measured there is the overhead, and a round takes a second.
    """
    if device.type != "cuda":
        return "llama-10m"
    free, _ = torch.cuda.mem_get_info(device)
    for size, billions in (("llama-8b", 8.0), ("llama-1b", 1.5), ("llama-100m", 0.16)):
        logits = 8 * tokens * _LLAMAS[size]["vocab_size"]  # and their gradient, in float32
        if free > 1.5 * (4e9 * billions + logits):
            return size  # type: ignore[return-value]
    return "llama-10m"
