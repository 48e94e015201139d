"""L4Q against the formulas of its card; that it resumes and deploys is the contract's (tests/test_methods.py)."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from qlightning import convert, restore
from qlightning.methods import L4Q
from qlightning.numerics import PerChannel, PerGroup

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # peft, of transformers
    pytest.mark.filterwarnings("ignore:.*num_workers"),
]


def converted(layer: nn.Module, **options: Any) -> Any:
    net = nn.Sequential(layer)
    convert(net, L4Q(**options).quantization()["rules"])
    return net


def dyadic(*shape: int, steps: int, unit: float) -> Tensor:
    """Multiples of a power of two: float32 computes with them as exactly as float64."""
    return torch.randint(-steps, steps + 1, shape).double() * unit


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("granularity", [8, "channel"])
def test_gradients_are_those_of_the_unfused_graph(bits: int, granularity: Any) -> None:
    """dA = alpha B^T (D . M), dB = alpha (D . M) A^T, ds = sum D (q - w or the end), db = sum D (1 - M); in float64."""
    torch.manual_seed(0)
    low, high, scaling = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, 0.5
    net = converted(nn.Linear(16, 6).double(), bits=bits, granularity=granularity, rank=2, scaling=scaling)
    layer, scale = net[0], net[0].weight_quantizer.scale
    with torch.no_grad():
        layer.weight.copy_(dyadic(6, 16, steps=160, unit=2**-6))
        layer.adapter.a.copy_(dyadic(2, 16, steps=4, unit=2**-3))
        layer.adapter.b.copy_(dyadic(6, 2, steps=4, unit=2**-3))
        scale.value.copy_(2.0 ** -torch.randint(1, 4, scale.value.shape))
        scale.lower.copy_(dyadic(*scale.lower.shape, steps=4, unit=2**-4))
    x, grad = dyadic(5, 16, steps=8, unit=2**-3).requires_grad_(), dyadic(5, 6, steps=8, unit=2**-3)
    ours = [x, layer.adapter.a, layer.adapter.b, scale.value, scale.lower]

    leaves = [t.detach().double().requires_grad_() for t in ours]
    x64, a, b, s, offset = leaves
    blocks = (layer.weight.detach() + scaling * (b @ a)).reshape(*scale.value.shape[:-1], -1)
    w = (blocks - offset) / s
    clamped = w.clamp(low, high)
    outside = ((w < low) | (w > high)).double().mean()
    assert 0.1 < outside < 0.9
    q = clamped + (clamped.round() - clamped).detach()
    expected = F.linear(x64, (s * q + offset).reshape(6, 16), layer.bias)

    y = net(x)
    assert torch.equal(y, expected)
    for mine, theirs in zip(
        torch.autograd.grad(y, ours, grad), torch.autograd.grad(expected, leaves, grad), strict=True
    ):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(mine.double(), theirs, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("bits", [3, 4])
def test_without_an_update_the_first_forward_rounds_to_nearest(bits: int) -> None:
    """s = max(|min W / Qn|, |max W / Qp|) per group, offset 0."""
    torch.manual_seed(0)
    plain = nn.Linear(16, 6)
    weight, x = plain.weight.detach().clone(), torch.randn(5, 16)
    net = converted(plain, bits=bits, granularity=8)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    groups = weight.view(6, 2, 8)
    step = torch.maximum((groups.amin(-1) / low).abs(), (groups.amax(-1) / high).abs()).unsqueeze(-1)
    rounded = (groups / step).round().clamp(low, high) * step
    assert torch.equal(net(x), F.linear(x, rounded.view(6, 16), plain.bias))
    assert net[0].adapter.alpha / net[0].adapter.rank == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_exported_computes_what_trained(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net = converted(nn.Linear(16, 6).to(dtype), bits=3, granularity=8)
    layer, x = net[0], torch.randn(5, 16, dtype=dtype)
    with torch.no_grad():
        layer.adapter.b.normal_(std=0.1)
        layer.weight_quantizer.scale.lower.normal_(std=0.01)
    y, quantizer = net(x), layer.weight_quantizer
    stored = quantizer.quantize(layer.effective("weight"))
    assert stored.codes.dtype == torch.int8
    assert torch.equal(F.linear(x, quantizer.dequantize(stored, dtype), layer.bias), y)
    restore(net)
    assert torch.equal(quantizer.quantize(net[0].weight.detach()).codes, stored.codes)


def llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))


class Tuned(LightningModule):
    """A PEFT model as users train it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.model = get_peft_model(llama(), LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"]))

    def training_step(self, ids: Tensor) -> Tensor:
        loss: Tensor = self.model(input_ids=ids, labels=ids).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def test_a_peft_model_is_tuned_resumed_and_merged(tmp_path: Path) -> None:
    ids = torch.randint(16, (8, 10), generator=torch.Generator().manual_seed(0))
    module = Tuned()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    trainer = Trainer(
        max_steps=4,
        accelerator="cpu",
        callbacks=L4Q(3, granularity=16, start=0.25).callbacks(),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, DataLoader(list(ids), batch_size=2))
    moved = {name for name, p in module.named_parameters() if name in before and not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_" in name}
    scales = {name: p for name, p in module.named_parameters() if "_quantizer." in name}
    assert len(scales) == 7 * 2
    assert all(p.grad is None or p.requires_grad for p in scales.values())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    loaded = Tuned.load_from_checkpoint(tmp_path / "end.ckpt", map_location="cpu").eval()
    trained = module.eval().model(input_ids=ids).logits
    assert torch.equal(loaded.model(input_ids=ids).logits, trained)
    merged = loaded.model.merge_and_unload()
    assert torch.equal(merged(input_ids=ids).logits, trained)
    assert not [name for name in merged.state_dict() if "lora_" in name]


def test_arguments() -> None:
    (scheme,) = L4Q(granularity="channel").quantization()["rules"].values()
    assert scheme.weight.granularity == PerChannel()
    (scheme,) = L4Q(offset="none", granularity=64).quantization()["rules"].values()
    assert scheme.weight.format.symmetric
    assert scheme.weight.granularity == PerGroup(64)
    with pytest.raises(ValueError, match="offset='none'"):
        L4Q(offset="zero")  # type: ignore[arg-type]
