"""LightningModules that others wrote, as they are: Lightning's demos, PEFT, compiled models."""

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.demos import LightningTransformer
from lightning.pytorch.demos.boring_classes import BoringModel, ManualOptimBoringModel
from torch.utils.data import TensorDataset

from qlightning import QATCallback
from qlightning.layers.convert import quantizers_of, restore
from qlightning.layers.layer import Twin

W4A8 = {"weight": "int4-lsq", "input": "int8-tensor-lsq", "start": 3, "calibration": 2}

pytestmark = [
    # Lightning warns of callbacks with state that a checkpoint knows and the Trainer does not: here it is the point.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),  # the demos' own loaders
    pytest.mark.filterwarnings(
        "ignore:.*Function'> should not be instantiated:DeprecationWarning"
    ),  # torch.compile does
]


@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")  # which saves what the step made
@pytest.mark.parametrize("cls", [BoringModel, ManualOptimBoringModel])
def test_boring_models(kit, cls):
    module = cls()
    save, steps = kit.every_step(kit.folder / "run"), kit.Record(look=lambda trainer, module: kit.scales(module))
    trainer = kit.trainer(QATCallback(**W4A8), save, steps, log_every_n_steps=1)
    trainer.fit(module)
    trainer.validate(module, verbose=False)
    trainer.test(module, verbose=False)
    predicted = torch.cat(trainer.predict(module))
    assert predicted.shape == (64, 2)
    assert all(quantizer.enabled for _, quantizer in quantizers_of(module))
    assert not any(torch.equal(steps.seen[3][name], steps.seen[7][name]) for name in steps.seen[3])
    path = kit.folder / "run" / "step=8.ckpt"
    x = torch.randn(5, 32)
    assert torch.equal(cls.load_from_checkpoint(path)(x), module(x))
    assert not torch.equal(restore(cls.load_from_checkpoint(path))(x), module(x))


@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning")
@pytest.mark.parametrize("start", [0, 3])
def test_the_learning_rate_finder(kit, start):
    """It takes all callbacks away and runs the module in its first phase; the fit after it begins at the beginning."""
    from lightning.pytorch.tuner import Tuner

    class Tuned(kit.Net):
        def __init__(self):
            super().__init__()
            self.lr = 0.02

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=self.lr)

    module, found = Tuned(), kit.Record(look=lambda trainer, module: {q.enabled for _, q in quantizers_of(module)})
    trainer = kit.trainer(QATCallback(**{**W4A8, "start": start}), found, max_steps=6)
    result = Tuner(trainer).lr_find(module, kit.loader(), kit.held_out(), num_training=25)
    assert module.lr == result.suggestion() != 0.02
    trainer.fit(module, kit.loader(), kit.held_out())
    assert found.seen == ([{True, False}] * 2 + [{True}] * 4 if start == 0 else [{False}] * 3 + [{True}] * 3)


class TinyTransformer(LightningTransformer):
    """Without the download."""

    def prepare_data(self):
        pass


def text(kit, *, shuffle=True):
    ids = torch.randint(11, (24, 7), generator=torch.Generator().manual_seed(0))
    return kit.Loader(TensorDataset(ids[:, :-1], ids[:, 1:]), batch_size=4, shuffle=shuffle)


def test_the_demo_language_model(kit):
    def run(resume=None):
        torch.manual_seed(1 if resume is None else 2)
        module, losses = TinyTransformer(vocab_size=11), kit.Record()
        qat = QATCallback(**W4A8, rules={"type:Embedding": "int8"})
        trainer = kit.trainer(qat, losses, kit.every_step(kit.folder / "run"), max_steps=6)
        trainer.fit(module, text(kit), ckpt_path=resume)
        return module, losses.losses, qat, trainer

    module, losses, qat, _ = run()
    converted = {row.kind: row for row in qat.coverage.converted}
    assert set(converted) == {"Linear", "Embedding", "MultiheadAttention"}
    assert qat.coverage.weight_share > 0.98
    path = kit.folder / "run" / "step=6.ckpt"
    ids = torch.arange(12).remainder(11).view(2, 6)
    loaded = TinyTransformer.load_from_checkpoint(path, vocab_size=11).eval()
    module.eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids, ids), module(ids, ids))
        assert not torch.equal(restore(loaded)(ids, ids), module(ids, ids))
    for step in (2, 4):
        _, again, _, _ = run(kit.folder / "run" / f"step={step}.ckpt")
        assert again == losses[step:]


class Adapted(LightningModule):
    """A user's own module around a PEFT-wrapped tiny Llama."""

    def __init__(self):
        super().__init__()
        from peft import LoraConfig, get_peft_model
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        llama = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=11, use_cache=False))
        self.model = get_peft_model(llama, LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.1))

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch[0], labels=batch[0]).loss

    def predict_step(self, batch, batch_idx):
        return self.model(input_ids=batch[0]).logits

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft, of transformers
def test_peft(kit):
    def run(resume=None):
        torch.manual_seed(1 if resume is None else 2)
        module, losses = Adapted(), kit.Record()
        trainer = kit.trainer(QATCallback(**W4A8), losses, kit.every_step(kit.folder / "run"))
        trainer.fit(module, text(kit), ckpt_path=resume)
        return module, losses.losses, trainer

    base = Adapted().state_dict()
    module, losses, trainer = run()
    state = module.state_dict()
    adapters = [name for name in base if "lora_" in name]
    assert len(adapters) == 14
    assert all(torch.equal(state[name], base[name]) == (name not in adapters) for name in base)
    assert {type(layer).__name__ for name, layer in module.named_modules() if name.endswith("base_layer")} == {
        "QuantLinear"
    }
    assert not any(isinstance(layer, Twin) for name, layer in module.named_modules() if "lora_" in name)
    adapted, scales = trainer.optimizers[0].param_groups
    assert len(adapted["params"]) == 14
    assert len(scales["params"]) == 14  # 7 layers, weight and input
    for step in (2, 5):
        assert run(kit.folder / "run" / f"step={step}.ckpt")[1] == losses[step:]
    wanted = torch.cat(trainer.predict(module, text(kit, shuffle=False)))
    path = kit.folder / "run" / "step=8.ckpt"
    predicted = kit.trainer().predict(Adapted(), text(kit, shuffle=False), ckpt_path=path)
    assert torch.equal(torch.cat(predicted), wanted)


# --- compiled ---

SOON = {"weight": "int4-lsq", "input": "int8-tensor-lsq", "start": 2, "calibration": 1}


@pytest.fixture
def graphs():
    """How many graphs were compiled so far."""
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("place", "backend"), [("init", "eager"), pytest.param("configure_model", "aot_eager", marks=pytest.mark.slow)]
)
def test_a_model_compiled_inside(kit, graphs, place, backend):
    class Compiled(kit.Net):
        def __init__(self):
            super().__init__()
            if place == "init":
                self.net = torch.compile(self.net, backend=backend)

        def configure_model(self):
            if place == "configure_model" and not hasattr(self.net, "_orig_mod"):
                self.net = torch.compile(self.net, backend=backend)

    options = {"max_steps": 6, "limit_val_batches": 0}
    plain, compiled = kit.Record(), kit.Record(look=lambda trainer, module: graphs())
    reference, module = kit.Net(), Compiled()
    kit.fit(reference, QATCallback(**SOON), plain, **options)
    kit.fit(module, QATCallback(**SOON), compiled, kit.every_step(kit.folder), **options)
    assert "net._orig_mod.0.input_quantizer" in [name for name, _ in quantizers_of(module)]
    assert [loss for _, loss in compiled.losses] == pytest.approx([loss for _, loss in plain.losses], rel=1e-5)
    assert compiled.seen == [0, 1, 2, 3, 3, 3]  # one graph a phase: float, observing, quantized
    loaded = Compiled.load_from_checkpoint(kit.folder / "step=6.ckpt")
    assert torch.equal(kit.outputs(loaded), kit.outputs(module))


def test_a_compiled_lightning_module(kit, graphs):
    options = {"max_steps": 6, "limit_val_batches": 0}
    plain, compiled = kit.Record(), kit.Record(look=lambda trainer, module: graphs())
    kit.fit(kit.Net(), QATCallback(**SOON), plain, kit.every_step(kit.folder / "plain"), **options)
    module = kit.Net()
    callbacks = QATCallback(**SOON), compiled, kit.every_step(kit.folder / "compiled")
    kit.fit(torch.compile(module, backend="aot_eager"), *callbacks, **options)
    assert [loss for _, loss in compiled.losses] == pytest.approx([loss for _, loss in plain.losses], rel=1e-5)
    assert compiled.seen[0] == 0 < compiled.seen[1]
    assert compiled.seen[3] == compiled.seen[5]
    saved = [torch.load(kit.folder / f"{kind}/step=6.ckpt")["state_dict"] for kind in ("plain", "compiled")]
    assert saved[0].keys() == saved[1].keys()
    loaded = kit.Net.load_from_checkpoint(kit.folder / "compiled/step=6.ckpt")
    assert torch.equal(kit.outputs(loaded), kit.outputs(module))
