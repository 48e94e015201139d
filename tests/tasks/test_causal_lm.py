import math

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torchmetrics.text import Perplexity
from transformers import LlamaConfig, LlamaForCausalLM

from qlightning.schedules import Cosine, Restart
from qlightning.tasks import CausalLM

from .conftest import LLAMA


def test_fit_learns_and_metrics_equal_an_independent_computation(text, trainer):
    torch.manual_seed(0)
    task = CausalLM(LLAMA, lr=1e-2)
    before = trainer().validate(task, text, verbose=False)[0]
    run = trainer(max_epochs=3)
    run.fit(task, text)
    logged = run.validate(task, text, verbose=False)[0]

    ids = text.rows.columns["input_ids"]
    with torch.no_grad():
        logits = task.eval()(ids)
    losses = [F.cross_entropy(row[:-1], target[1:], reduction="sum") for row, target in zip(logits, ids, strict=True)]
    mean = (sum(losses) / ids[:, 1:].numel()).item()
    oracle = Perplexity()
    oracle.update(logits[:, :-1], ids[:, 1:])

    assert logged["val_loss"] == pytest.approx(mean, rel=1e-5)
    assert logged["val_perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
    assert logged["val_perplexity"] == pytest.approx(oracle.compute().item(), rel=1e-5)
    assert logged["val_nats_per_byte"] == pytest.approx(mean / 2.5, rel=1e-5)
    assert logged["val_loss"] < before["val_loss"] - 0.05
    tested = run.test(task, text, verbose=False)[0]
    assert tested == {name: logged[name.replace("test", "val")] for name in ("test_loss", "test_perplexity")}


def test_the_loss_is_the_one_transformers_computes(text):
    task = CausalLM({**LLAMA, "vocab_size": 13})
    task.configure_model()
    batch = {"input_ids": text.rows.columns["input_ids"]}
    expected = task.model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
    torch.testing.assert_close(task._token_losses(batch).mean(), expected)


def test_perplexity_of_a_confident_mistake_is_finite(text, trainer):
    # torchmetrics' Perplexity is infinite here: float32 softmax rounds the right token's probability to 0
    task = CausalLM({**LLAMA, "vocab_size": 13})
    task.configure_model()
    logits = torch.zeros(1, 2, 13)
    logits[..., 0] = 200.0
    oracle = Perplexity()
    oracle.update(logits[:, :1], torch.tensor([[1]]))
    assert oracle.compute() == math.inf
    task.forward = lambda ids: logits
    task.validation_step({"input_ids": torch.tensor([[0, 1]])}, 0)
    assert task.held_out.finish("val")["val_loss"].item() == pytest.approx(200.0)


def test_load_from_checkpoint_needs_only_the_file(text, trainer, tmp_path):
    schedule = Restart(at=0.5, before=Cosine(), after=Cosine(floor=0.1), peak=0.2)
    task = CausalLM(LLAMA, lr=3e-3, betas=(0.8, 0.9), schedule=schedule)
    run = trainer(max_epochs=2)
    run.fit(task, text)
    run.save_checkpoint(tmp_path / "last.ckpt")
    loaded = CausalLM.load_from_checkpoint(tmp_path / "last.ckpt")
    assert loaded.model.config.vocab_size == 13
    assert loaded.schedule == schedule
    assert (loaded.hparams["lr"], loaded.hparams["betas"]) == (3e-3, [0.8, 0.9])
    ours, theirs = (trainer().predict(t, text) for t in (task, loaded))
    assert [tuple(batch.shape) for batch in ours] == [(4, 9, 13), (4, 9, 13), (2, 9, 13)]
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # the resumed run saves to a folder of its own
def test_a_run_goes_on_from_its_checkpoint(text, trainer, tmp_path):
    torch.manual_seed(0)
    schedule = Cosine(warmup=2)
    whole = CausalLM(LLAMA, schedule=schedule)

    def saving(folder):
        saver = ModelCheckpoint(dirpath=tmp_path / folder, save_top_k=-1, filename="{epoch}")
        return trainer(max_epochs=3, callbacks=[saver], enable_checkpointing=True)

    saving("whole").fit(whole, text)
    resumed = CausalLM(LLAMA, schedule=schedule)
    saving("resumed").fit(resumed, text, ckpt_path=tmp_path / "whole" / "epoch=0.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_a_local_folder_gives_its_weights_in_float32(text, trainer, tmp_path):
    config = LlamaConfig(**{k: v for k, v in LLAMA.items() if k != "model_type"}, vocab_size=20)
    source = LlamaForCausalLM(config).to(torch.bfloat16)
    source.save_pretrained(tmp_path / "model")
    task = CausalLM(str(tmp_path / "model"))
    trainer().validate(task, text, verbose=False)
    assert all(torch.equal(a, b.float()) for a, b in zip(task.parameters(), source.parameters(), strict=True))
    assert {p.dtype for p in task.parameters()} == {torch.float32}


def test_bf16_true_builds_the_model_in_bf16(text, trainer):
    task = CausalLM(LLAMA)
    trainer(precision="bf16-true", max_steps=1).fit(task, text)
    assert {p.dtype for p in task.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"hidden_size": 16}, "has no model_type"),
        ({**LLAMA, "model_type": "lama"}, "did you mean 'llama'"),
        ({**LLAMA, "hiden_size": 16}, "did you mean 'hidden_size'"),
        ({**LLAMA, "vocab_size": 7}, "vocab_size=13"),
    ],
)
def test_errors_show_the_corrected_call(text, trainer, model, message):
    with pytest.raises(ValueError, match=message):
        trainer().fit(CausalLM(model), text)


def test_a_vocabulary_nobody_knows_is_an_error(text, trainer):
    with pytest.raises(ValueError, match=r"CausalLM\(.*'vocab_size': 256"):
        trainer().fit(CausalLM(LLAMA), text.train_dataloader(), text.val_dataloader())


def test_rotary_frequencies_stay_as_whoever_serves_the_model_has_them(text, trainer, tmp_path):
    from qlightning.export.checkpoint import load_trained

    task = CausalLM({**LLAMA, "model_type": "llama"})
    run = trainer(max_steps=1, precision="bf16-true")
    run.fit(task, text)
    rotary = task.model.model.rotary_emb
    assert {parameter.dtype for parameter in task.parameters()} == {torch.bfloat16}
    assert (rotary.inv_freq.dtype, rotary.original_inv_freq.dtype) == (torch.float32, torch.float32)
    assert torch.equal(rotary.inv_freq, LlamaForCausalLM(task.model.config).model.rotary_emb.inv_freq)
    run.save_checkpoint(tmp_path / "last.ckpt")
    ids = text.rows.columns["input_ids"]
    with torch.no_grad():
        assert torch.equal(load_trained(tmp_path / "last.ckpt")(ids), task.eval()(ids))


def test_labels_say_what_counts_as_in_transformers(text):
    task = CausalLM({**LLAMA, "vocab_size": 13})
    task.configure_model()
    ids = text.rows.columns["input_ids"]
    labels = ids.clone()
    labels[:, :3], labels[0] = -100, 7
    expected = task.model(input_ids=ids, labels=labels).loss
    for tokens in (None, 16):
        task.hparams["chunked_loss"] = tokens
        torch.testing.assert_close(task._token_losses({"input_ids": ids, "labels": labels}).mean(), expected)


def test_in_pieces_it_learns_the_same_and_says_so_in_its_file(text, trainer, tmp_path):
    runs = []
    for tokens in (None, 5):
        torch.manual_seed(0)
        task, run = CausalLM(LLAMA, lr=1e-2, chunked_loss=tokens), trainer(max_epochs=2)
        run.fit(task, text)
        runs.append((task, run.validate(task, text, verbose=False)[0]))
        run.save_checkpoint(tmp_path / "last.ckpt")
    assert runs[1][1] == pytest.approx(runs[0][1], rel=1e-4)
    for whole, pieces in zip(runs[0][0].parameters(), runs[1][0].parameters(), strict=True):
        torch.testing.assert_close(pieces, whole, rtol=1e-3, atol=1e-4)
    assert CausalLM.load_from_checkpoint(tmp_path / "last.ckpt").hparams["chunked_loss"] == 5


def test_pieces_are_refused_where_logits_are_not_the_heads(text, trainer):
    with pytest.raises(ValueError, match="chunked_loss=0: at least 1"):
        CausalLM(LLAMA, chunked_loss=0)
    with pytest.raises(ValueError, match=r"GraniteForCausalLM .* leave chunked_loss out"):
        trainer().fit(CausalLM({**LLAMA, "model_type": "granite", "logits_scaling": 2.0}, chunked_loss=4), text)
