"""ApiQ as a method: fine-tuning of adapters begins where it leaves them. The solver: tests/solvers/test_apiq.py."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from qlightning import solvers
from qlightning.data.loader import Loader
from qlightning.methods import L4Q, ApiQ, Method, compose
from qlightning.numerics import parse

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft, of transformers


def test_what_it_determines() -> None:
    asked = ApiQ(3, granularity=32, level="layer", epochs=2, batches=4).quantization()
    assert asked["weight"] == parse("int3-g32-asym")
    assert asked["init"] == solvers.ApiQ(level="layer", epochs=2, batches=4)


class Adapted(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
        base = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_attention_heads=2))
        with torch.no_grad():
            for p in base.parameters():
                p.mul_(4.0 if p.dim() > 1 else 1.0)
        config = LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model = get_peft_model(base, config)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1e-3)


class Losses(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *args: Any) -> None:
        self.losses.append(float(outputs["loss"]))


def fit(method: Method) -> tuple[Adapted, list[float]]:
    module, losses = Adapted(), Losses()
    rows = torch.randint(16, (16, 8), generator=torch.Generator().manual_seed(0))
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        accelerator="cpu",
        max_steps=2,
        callbacks=[*compose(method), losses],
        enable_checkpointing=False,
        limit_val_batches=0,
        **quiet,
    )
    trainer.fit(module, Loader(list(rows), batch_size=4))
    return module, losses.losses


def test_the_fit_begins_with_weights_untouched_and_adapters_that_help() -> None:
    plain = {name: p.detach().clone() for name, p in Adapted().named_parameters()}
    module, _ = fit(ApiQ(2, granularity=8, epochs=20, adapter_lr=5e-3, clip_lr=2e-2, batches=4))
    now = {name: p for name, p in module.named_parameters() if name in plain}
    assert all(torch.equal(p, plain[name]) for name, p in now.items() if "lora_" not in name)
    assert all(bool(p.any()) for name, p in now.items() if "lora_B" in name)
    frozen = module.model.base_model.model.model.layers[0].mlp.down_proj.base_layer.weight
    assert not frozen.requires_grad


def test_adapters_inside_the_quantizer_are_another_method() -> None:
    with pytest.raises(ValueError, match="outside: use one of them"):
        compose(ApiQ(), L4Q())
