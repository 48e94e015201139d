"""OFQ against its formulas; its product of projections is tested in tests/layers/test_query_key.py."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from qlightning.callbacks.stages import AsConverted
from qlightning.data.loader import Loader
from qlightning.methods import OFQ, Quantization, compose
from qlightning.numerics import STE, PerTensor, Quantizer
from qlightning.numerics.near import NearThreshold
from qlightning.numerics.per_position import PerPosition
from qlightning.optim.oscillation import positions, threshold_distance
from qlightning.optim.weights import weights_of


def statsq(bits: int = 2) -> Quantizer:
    return OFQ(bits).quantization()["rules"]["*"].weight


def test_two_bits_have_four_levels_and_no_zero() -> None:
    w = torch.randn(8, 512)
    a = 2 * w.abs().mean(1, keepdim=True)
    found = statsq()(w) / a
    assert sorted({round(v, 4) for v in found.flatten().tolist()}) == [-0.75, -0.25, 0.25, 0.75]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gradients_pass_everywhere(bits: int) -> None:
    w = torch.randn(8, 512, requires_grad=True)
    assert (w.detach().abs() > 2 * w.detach().abs().mean(1, keepdim=True)).any()
    (grad,) = torch.autograd.grad(statsq(bits)(w).sum(), w)
    assert torch.equal(grad, torch.ones_like(w))


@pytest.mark.parametrize("c", [0.25, 3.0, 1000.0])
def test_scaling_the_weight_scales_the_result(c: float) -> None:
    w = torch.randn(8, 512)
    assert torch.allclose(statsq()(c * w), c * statsq()(w), rtol=1e-6)


def test_steps_start_where_the_paper_starts_them() -> None:
    x = torch.randn(4, 6, 16)
    rules = OFQ(2, input_bits=4, positions=6).quantization()["rules"]
    probabilities: Quantizer = rules["attention"].attention
    probabilities.build((-1, -1))
    probabilities.initialize(x.softmax(-1))
    assert next(probabilities.learned()).item() == pytest.approx(4 * (1 / 16) / 15**0.5)
    shifted = rules["*"].input
    shifted.build((-1, 16))
    shifted.initialize(x)
    step, before, after = shifted.learned()
    assert torch.allclose(step[:, 0], 2 * x.abs().mean((0, 2)) / 7**0.5)
    assert before.shape == after.shape == (16,)


def test_arguments_choose_the_parts() -> None:
    with_product = OFQ().quantization()
    assert with_product["rules"]["q_proj"] is None
    assert [phase.at for phase in with_product["schedule"]] == [0, 0.92]
    projections = OFQ(scores="projections").quantization()
    assert projections["rules"]["q_proj"].output.granularity == PerTensor()
    assert "query_key" not in projections["rules"]
    assert len(projections["schedule"]) == 1
    assert OFQ(positions=17).quantization()["rules"]["v_proj"].output.granularity == PerPosition(17)
    assert OFQ(teacher=None, boundary=None).extras() == []
    assert [type(extra).__name__ for extra in OFQ().extras()] == ["DistillationCallback", "ConfidenceAnnealing"]
    with pytest.raises(ValueError, match="product"):
        OFQ(scores="both")  # type: ignore[arg-type]


class Vit(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        import transformers

        torch.manual_seed(0)
        config = transformers.ViTConfig(
            hidden_size=16,
            num_attention_heads=2,
            intermediate_size=16,
            num_hidden_layers=1,
            image_size=8,
            patch_size=4,
            num_channels=1,
            num_labels=3,
        )
        self.model = transformers.ViTForImageClassification(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.3)


class Look(Callback):
    """Which weights are near a threshold before a step, and what all weights are after it."""

    def __init__(self, boundary: float) -> None:
        self.boundary = boundary
        self.near: dict[str, Tensor] = {}
        self.before: dict[str, Tensor] = {}
        self.moved: list[float] = []
        self.held = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        for weight in weights_of(pl_module):
            matrix = weight.matrix()
            quantizer: Any = weight.quantizer
            self.before[weight.name] = matrix.clone()
            v = positions(quantizer, matrix, weight.state(matrix))
            self.near[weight.name] = threshold_distance(v, quantizer.format) <= self.boundary

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        for weight in weights_of(pl_module):
            if weight.name.endswith("query_key.weight"):
                continue
            same = weight.matrix() == self.before[weight.name]
            if trainer.global_step > 3:
                assert bool(same[~self.near[weight.name]].all())
                assert not bool(same[self.near[weight.name]].all())
                self.held += 1
            elif trainer.global_step > 1:  # the first step of a schedule may have a rate of zero
                self.moved.append(float((~same).float().mean()))


def test_in_the_end_confident_weights_are_identical_bit_for_bit(tmp_path: Path) -> None:
    method = OFQ(boundary=0.1, anneal=3, teacher=None)
    look, g = Look(0.1), torch.Generator().manual_seed(2)
    rows = [(torch.randn(1, 8, 8, generator=g), torch.randint(3, (), generator=g)) for _ in range(24)]
    trainer = Trainer(
        max_steps=5,
        callbacks=[*compose(method, Quantization(calibration=1)), look],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    module = Vit()
    trainer.fit(module, Loader(rows, batch_size=4))
    assert min(look.moved) > 0.9
    assert look.held == 2 * 6  # v, o, fc1, fc2, patch embedding and classifier, in two steps
    product: Any = module.model.vit.layers[0].attention.query_key.weight_quantizer
    assert isinstance(product.gradient, NearThreshold)
    assert product.gradient.boundary == 0.1
    with AsConverted(module):  # as a later run of the same callbacks finds it
        assert product.gradient == STE()
    assert isinstance(product.gradient, NearThreshold)
