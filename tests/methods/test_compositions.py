"""Methods together, as users compose them: they train, resume bit for bit, and deploy on one grid."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from qlightning.capture import sites_of
from qlightning.data.loader import Loader
from qlightning.layers.convert import quantizers_of
from qlightning.losses import KL
from qlightning.methods import AWQ, CAGE, GPTQ, L4Q, LSQ, CooldownFusion, EfficientQAT, ParetoQ, compose
from qlightning.schedules import Constant
from qlightning.tasks.optimizer import adamw

STEPS = 6
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # peft, of transformers
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
    with torch.no_grad():  # attention does something, and some channels are large
        for p in model.parameters():
            p.mul_(4.0 if p.dim() > 1 else 1.0)
        model.model.layers[0].input_layernorm.weight[3] *= 8
    return model


class Task(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.schedule = Constant()
        self.model: Any = llama()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.model(input_ids=batch, labels=batch, use_cache=False).loss
        return loss

    def configure_optimizers(self) -> Any:
        return adamw(self, self.schedule, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)


class Tuned(Task):
    """The same with PEFT's adapters."""

    def __init__(self) -> None:
        super().__init__()
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(1)
        self.model = get_peft_model(self.model, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"]))


class Record(Callback):
    def __init__(self) -> None:
        self.losses: dict[int, float] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *args: Any) -> None:
        self.losses[trainer.global_step] = float(outputs["loss"])


def fit(
    task: Callable[[], Task], callbacks: Callable[[], list[Callback]], folder: Path, resume: int | None = None
) -> Any:
    module, record = task(), Record()
    every = ModelCheckpoint(
        folder, filename="{step}", every_n_train_steps=1, save_top_k=-1, save_on_train_epoch_end=False
    )
    trainer = Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        callbacks=[*callbacks(), record, every],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    rows = torch.randint(16, (4 * STEPS, 8), generator=torch.Generator().manual_seed(0))
    trainer.fit(module, Loader(list(rows), batch_size=4), ckpt_path=resume and folder / f"step={resume}.ckpt")
    return module, record.losses


def check(
    task: Callable[[], Task], callbacks: Callable[[], list[Callback]], folder: Path, *, resumes: list[int]
) -> Any:
    """Fit, resume, and put every weight on its grid. Returns the trained module."""
    module, losses = fit(task, callbacks, folder)
    assert len(losses) == STEPS
    assert all(torch.isfinite(torch.tensor(list(losses.values()))))
    for step in resumes:
        _, resumed = fit(task, callbacks, folder, step)
        assert resumed == {at: loss for at, loss in losses.items() if at > step}
    module.eval()
    sites = sites_of(module)
    assert len(sites) >= 7
    for site in sites:
        matrix = site.layer.effective(site.prefix)
        assert site.quantizer.enabled
        assert torch.equal(
            site.quantizer.dequantize(site.quantizer.quantize(matrix), matrix.dtype), site.quantizer(matrix)
        )
    return module


def test_scales_from_activations_learned_steps_and_one_cooldown(tmp_path: Path) -> None:
    """Resumed from before the weights are scaled, and from after."""

    def callbacks() -> list[Callback]:
        awq = AWQ(bits=None, grid=4, batches=2, start=0.5)
        return compose(awq, LSQ(4, granularity=8, start=0.5), CooldownFusion(start=0.5, warmup=1))

    module = check(Task, callbacks, tmp_path, resumes=[2, 4])
    norm = module.model.model.layers[0].input_layernorm.weight
    assert float(norm.detach().max()) < 7  # the large channel has moved into the weights
    assert all(list(quantizer.learned()) for _, quantizer in quantizers_of(module))


def test_adapters_inside_the_quantizer_on_a_peft_model_taught_by_the_float_model(tmp_path: Path) -> None:
    from qlightning.callbacks.distillation import DistillationCallback

    def callbacks() -> list[Callback]:
        teacher = DistillationCallback(llama(), at="model", losses={"forward:logits": KL()}, task_weight=0.5)
        return [*compose(L4Q(3, granularity=8)), teacher]

    module = check(Tuned, callbacks, tmp_path, resumes=[3])
    plain = Tuned()
    trained = dict(module.named_parameters())
    moved = {name for name, p in plain.named_parameters() if not torch.equal(p, trained[name])}
    assert moved == {name for name, _ in plain.named_parameters() if "lora_" in name}


def test_one_methods_grid_and_anothers_pull_toward_it(tmp_path: Path) -> None:
    def callbacks() -> list[Callback]:
        return compose(ParetoQ(2, granularity=8, start=0.25), CAGE(bits=None, strength=20.0, silence=0.5))

    pulled = check(Task, callbacks, tmp_path / "pulled", resumes=[4])
    plain, _ = fit(Task, ParetoQ(2, granularity=8, start=0.25).callbacks, tmp_path / "plain")

    def distance(module: Task) -> float:
        sites = sites_of(module)
        return sum(float((site.quantizer(site.weight) - site.weight).detach().square().sum()) for site in sites)

    assert distance(pulled) < distance(plain)


@pytest.mark.parametrize(
    ("methods", "reason"),
    [
        ([LSQ(4), ParetoQ(2)], "LSQ determines weight=.* one run has one of them"),
        ([L4Q(), LSQ()], "L4Q determines a rule for every layer and LSQ a weight spec"),
        ([AWQ(), GPTQ(bits=None)], "both find the weights that training starts from"),
        ([EfficientQAT(), CooldownFusion(start=0.8)], "schedule= says everything that start"),
        ([LSQ(4, start=0.5), CooldownFusion(start=0.8)], r"start=0\.5 .* start=0\.8"),
    ],
)
def test_what_does_not_go_together_says_why(methods: list[Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        compose(*methods)
