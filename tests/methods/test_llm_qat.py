"""LLM-QAT against the release's formulas; what is quantized where; the float self as the only teacher."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from qlightning import convert
from qlightning.callbacks.distillation import DistillationCallback
from qlightning.data.generated import GeneratedText
from qlightning.data.loader import Loader
from qlightning.layers.convert import quantizers_of
from qlightning.losses import KL, MSE, Cosine
from qlightning.methods import LLMQAT, Quantization, compose
from qlightning.numerics import PerChannel, PerToken
from qlightning.tasks import CausalLM

LLAMA = {
    "model_type": "llama",
    **{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"max_position_embeddings": 32, "vocab_size": 13},
}


def quantizer(placement: str, **options: Any) -> Any:
    return LLMQAT(**options).quantization()[placement]


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("placement", ["weight", "input"])
def test_rows_from_their_largest_magnitude(bits: int, placement: str) -> None:
    """Idempotent, within half a step, the largest magnitude as it was; the release's epsilons move little."""
    x = torch.randn(40, 33, generator=torch.Generator().manual_seed(bits)) * torch.logspace(-2, 2, 40)[:, None]
    q = quantizer(placement, bits=bits, input_bits=bits)
    assert q.granularity == (PerChannel() if placement == "weight" else PerToken())
    y, largest, codes = q(x), x.abs().amax(1, keepdim=True), 2 ** (bits - 1) - 1
    assert torch.allclose(q(y), y, rtol=1e-6)
    assert ((x - y).abs() <= 0.5 * largest / codes * (1 + 1e-5)).all()
    top = x.abs().argmax(1, keepdim=True)
    assert torch.allclose(y.gather(1, top), x.gather(1, top), rtol=1e-6)
    s = codes / (largest + 1e-6)
    release = torch.round(x * s) / (s + 1e-6)
    same = (release - y).abs() <= 0.02 * largest / codes
    assert same.float().mean() > 0.999  # beside ties that the epsilon moves


def test_two_bits_and_one() -> None:
    w = torch.randn(20, 31, generator=torch.Generator().manual_seed(0)) * 3
    mean = w.abs().mean(1, keepdim=True)
    alpha = 2 * mean
    release = alpha * (torch.round((w / alpha).clamp(-0.99, 0.99) * 2 - 0.5) + 0.5) / 2
    assert torch.allclose(quantizer("weight", bits=2)(w), release, rtol=1e-5)
    assert torch.allclose(quantizer("weight", bits=1)(w), mean * w.sign(), rtol=1e-6)


def test_gradients_pass_straight_through() -> None:
    x = (10 * torch.randn(4, 16)).requires_grad_()
    for placement in ("weight", "input"):
        (grad,) = torch.autograd.grad(quantizer(placement)(x).sum(), x)
        assert torch.equal(grad, torch.ones_like(x))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_the_released_gradient_is_zero_from_2_on_though_nothing_is_clipped(bits: int) -> None:
    x = torch.tensor([[-7.0, -2.0, -1.9, 0.0, 0.3, 1.999, 2.0, 9.0]])
    expected = torch.tensor([[0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0]])
    asked = LLMQAT(bits=bits, gradient="released").quantization()
    for q in (asked["weight"], asked["input"], asked["rules"]["k_proj"]["output"]):
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(q(leaf).sum(), leaf)
        assert torch.equal(grad, expected)
    assert torch.equal(asked["weight"](x), quantizer("weight", bits=bits)(x))
    with pytest.raises(ValueError, match="gradient='straight-through' or 'released'"):
        LLMQAT(gradient="clipped")  # type: ignore[arg-type]


def test_layers_have_the_released_gradient_too() -> None:
    """Weight and input of a whole layer, whose backward is a function of its own, by autograd of the formula."""
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(8, 4, bias=False), (2 * torch.randn(5, 8)).requires_grad_()
    torch.nn.init.normal_(layer.weight, std=2.0)
    asked = LLMQAT(gradient="released", kv_bits=None).quantization()
    w = layer.weight.detach().clone().requires_grad_()
    masked = [t * (t.abs() < 2) for t in (w, x)]
    values = [asked["weight"](w).detach(), asked["input"](x).detach()]
    q_w, q_x = (t + (value - t).detach() for t, value in zip(masked, values, strict=True))
    wanted = torch.autograd.grad((q_x @ q_w.t()).square().sum(), [w, x])
    model = torch.nn.Sequential(layer)
    convert(model, {"*": {"weight": asked["weight"], "input": asked["input"]}})
    found = torch.autograd.grad(model(x).square().sum(), [layer.weight, x])
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert all(bool((grad == 0).any()) for grad in found)


def built(**options: Any) -> CausalLM:
    task = CausalLM(LLAMA)
    task.configure_model()
    given = LLMQAT(**options).quantization()
    given.pop("start")
    rules = given.pop("rules", {})
    convert(task, {"*": given, **rules})
    return task


def test_keys_and_values_as_their_projections_give_them() -> None:
    task = built(kv_bits=3)
    names = {name for name, _ in quantizers_of(task)}
    attention = "model.model.layers.0.self_attn"
    assert {n for n in names if n.endswith("output_quantizer")} == {
        f"{attention}.{p}_proj.output_quantizer" for p in "kv"
    }
    assert {n for n in names if "lm_head" in n or "embed" in n} == set()
    seen: dict[str, Tensor] = {}
    for p in "qkv":
        layer = task.get_submodule(f"{attention}.{p}_proj")
        layer.register_forward_hook(lambda m, i, y, p=p: seen.__setitem__(p, y.detach()))
    task(torch.randint(13, (2, 9)))
    levels = {p: max(len(token.unique()) for token in y.flatten(0, 1)) for p, y in seen.items()}
    assert levels["k"] <= 7
    assert levels["v"] <= 7
    assert levels["q"] > 7


def test_keys_and_values_in_the_cache() -> None:
    names = {name for name, _ in quantizers_of(built(kv_place="cache"))}
    assert {n for n in names if n.endswith(("key_quantizer", "value_quantizer"))} == {
        f"model.model.layers.0.self_attn.{p}_quantizer" for p in ("key", "value")
    }
    assert not any(n.endswith("output_quantizer") for n in names)
    assert not any("key" in n for n, _ in quantizers_of(built(kv_bits=None)))


class Losses(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.moved: list[bool] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *args: Any) -> None:
        self.losses.append(float(outputs["loss"]))
        self.moved.append(not same(weights(pl_module), self.begin))

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.begin = weights(pl_module)


def weights(module: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def fit(task: Any, data: Any, folder: Any, *callbacks: Callback, steps: int) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        default_root_dir=folder,
    )
    trainer.fit(task, data)
    return trainer


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_taught_by_its_float_self_alone(tmp_path: Any) -> None:
    """As long as it is float there is nothing to learn: the loss is 0, the gradient too, and no weight moves."""
    torch.manual_seed(0)
    rows = [{"input_ids": torch.randint(13, (9,))} for _ in range(16)]
    task, record = CausalLM(LLAMA, weight_decay=0.0), Losses()
    callbacks = LLMQAT(bits=3, start=2).callbacks()
    trainer = fit(task, Loader(rows, batch_size=4), tmp_path, *callbacks, record, steps=5)
    assert record.losses[:2] == [0.0, 0.0]
    assert min(record.losses[2:]) > 0
    assert record.moved == [False, False, True, True, True]
    assert float(trainer.callback_metrics["train_loss"]) > 1  # the task's own is still logged
    (distillation,) = [c for c in callbacks if isinstance(c, DistillationCallback)]
    assert distillation._teacher is not None
    teacher = distillation._teacher.module
    assert same(weights(teacher), record.begin)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not any(True for _ in quantizers_of(teacher))


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_hidden_states_of_a_larger_model_under_gradient_checkpointing(tmp_path: Any) -> None:
    """The teacher is a plain model of transformers that stands beside the task's; nothing changes by recomputation."""
    torch.manual_seed(0)
    rows = [{"input_ids": torch.randint(13, (9,))} for _ in range(8)]
    larger = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**LLAMA, "num_hidden_layers": 3}))
    seen = []
    for recompute in (False, True):
        torch.manual_seed(1)
        task, record = CausalLM(LLAMA), Losses()
        task.configure_model()
        if recompute:
            task.model.activation_checkpointing_enable({"use_reentrant": False})
        distillation = DistillationCallback(
            larger,
            losses={"forward": KL(), "model.layers.0": MSE(normalize="length"), "mlp": Cosine()},
            pairs={"model.layers.0": "model.layers.2", "mlp": "model.layers.1.mlp"},
            at="model",
            task_weight=0.5,
        )
        fit(task, Loader(rows, batch_size=4), tmp_path, *LLMQAT().callbacks()[:1], distillation, record, steps=3)
        seen.append((record.losses, weights(task)))
    assert seen[0][0] == seen[1][0]
    assert same(seen[0][1], seen[1][1])


@pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode")  # as transformers loads them
def test_on_text_of_its_own(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLIGHTNING_CACHE", str(tmp_path / "cache"))
    float_ = CausalLM(LLAMA)
    float_.configure_model()
    float_.model.save_pretrained(tmp_path / "float")
    data = GeneratedText(str(tmp_path / "float"), sequence_length=8, batch_size=6)
    student, record = CausalLM(str(tmp_path / "float")), Losses()
    fit(student, data, tmp_path, *LLMQAT().callbacks(), record, steps=4)
    assert min(record.losses) > 0
    assert student.hparams["model"]["vocab_size"] == data.vocab_size == 13


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"kv_place='projection' or kv_place='cache'"):
        LLMQAT(kv_place="head")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"kv_bits=1\): at least 2 bits, or None"):
        LLMQAT(kv_bits=1)
    _, distillation = compose(LLMQAT(), Quantization(freeze_scales=0.9))
    assert isinstance(distillation, DistillationCallback)
    assert distillation.task_weight == 0
