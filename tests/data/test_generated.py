"""Generated text is the model's: greedy as transformers is, sampled as its probabilities say, the same by seed."""

import os

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from qlightning import QATCallback
from qlightning.data import StandardLibraryText
from qlightning.data.generated import GeneratedText, write_texts
from qlightning.data.loader import seeded
from qlightning.tasks import CausalLM

CONFIG = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "vocab_size": 13,
    "tie_word_embeddings": False,
}


def make_model(seed=0, **more):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**CONFIG, **more})).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(40)  # so that some tokens are likelier than others
    return model


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture
def folder(tmp_path, model):
    model.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def write(model, starts, greedy, length, *, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return write_texts(model, torch.tensor(starts), torch.tensor(greedy), length=length, generator=generator, **options)


def test_the_beginning_is_greedy(model):
    starts = list(range(1, 13))
    wanted = model.generate(
        torch.tensor(starts)[:, None],
        attention_mask=torch.ones(12, 1, dtype=torch.long),
        max_new_tokens=9,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    texts = torch.stack(write(model, starts, [5] * 12, 10))
    assert texts.shape == (12, 10)
    assert torch.equal(texts[:, :5], wanted[:, :5])
    assert not torch.equal(texts[:, 5:], wanted[:, 5:])
    assert torch.equal(torch.stack(write(model, starts, [10] * 12, 10)), wanted)
    assert torch.equal(torch.stack(write(model, starts, [1] * 12, 10, temperature=1e-6)), wanted)
    mixed = torch.stack(write(model, starts, [2, 5, 8] * 4, 10))
    for text, k, likely in zip(mixed, [2, 5, 8] * 4, wanted, strict=True):
        assert torch.equal(text[:k], likely[:k])


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_rest_is_sampled(model, temperature):
    texts = torch.stack(write(model, [3] * 4000, [1] * 4000, 2, temperature=temperature))
    with torch.no_grad():
        p = (model(torch.tensor([[3]])).logits[0, -1] / temperature).softmax(-1)
    seen = torch.bincount(texts[:, 1], minlength=13) / 4000
    assert torch.allclose(seen, p, atol=4 * 0.5 / 4000**0.5)
    assert p.max() < 0.97


class WithoutCache(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, past_key_values, use_cache):
        return CausalLMOutputWithPast(logits=self.model(input_ids=input_ids, use_cache=False).logits)


def test_without_a_cache(model):
    one = write(model, [1, 2, 3], [2, 3, 4], 12)
    other = write(WithoutCache(model), [1, 2, 3], [2, 3, 4], 12)
    assert torch.equal(torch.stack(one), torch.stack(other))


def test_texts_end(model):
    starts = [1, 2, 3, 4, 7, 8]
    whole = torch.stack(write(model, starts, [1] * 6, 40))
    end = int(whole[0, 10])
    texts = write(model, starts, [1] * 6, 40, end=end)
    for text, full in zip(texts, whole, strict=True):
        found = (full == end).nonzero().flatten().tolist()
        size = found[0] + 1 if found else 40
        assert torch.equal(text, full[:size])
    assert len({len(text) for text in texts}) > 1
    assert write(model, [end], [3], 40, end=end)[0].tolist() == [end]


def stream(data, split="train"):
    windows = data.dataset(split)
    return torch.stack([windows[i]["input_ids"] for i in range(len(windows))])


def test_a_datamodule(folder, model, tmp_path, monkeypatch):
    monkeypatch.setenv("QLIGHTNING_CACHE", str(tmp_path / "cache"))
    options = {"sequence_length": 8, "greedy": (2, 3), "held_out": 0.2, "batch_size": 4, "texts_at_once": 10}
    data = GeneratedText(folder, **options)
    data.prepare_data()
    data.setup("fit")
    assert data.vocab_size == 13
    assert data.bytes_per_token is None
    assert [len(data.dataset(split)) for split in ("train", "validation", "test")] == [16, 5, 5]
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].shape == (4, 8)
    assert batch["input_ids"].dtype == torch.int64
    every = torch.cat([stream(data, split) for split in ("train", "validation", "test")])
    assert sorted(every[:, 0].tolist()) == sorted([*range(13)] * 2)  # each start token with each length
    (file,) = (tmp_path / "cache").iterdir()
    written = file.stat().st_mtime_ns

    again = GeneratedText(folder, **options)
    assert torch.equal(stream(again), stream(data))
    assert file.stat().st_mtime_ns == written  # read, not written again
    monkeypatch.setenv("QLIGHTNING_CACHE", str(tmp_path / "other"))
    assert torch.equal(stream(GeneratedText(folder, **options)), stream(data))  # and written alike
    assert not torch.equal(stream(GeneratedText(folder, seed=1, **options)), stream(data))
    model_now = make_model(seed=1)
    model_now.save_pretrained(folder)
    assert not torch.equal(stream(GeneratedText(folder, **options)), stream(data))
    assert len(list((tmp_path / "other").iterdir())) == 3


def test_how_much_is_written(folder):
    data = GeneratedText(folder, sequences=5, sequence_length=8, start_tokens=[4, 6], greedy=[2])
    starts, greedy = data._plan()
    assert sorted(starts.tolist()) in ([4, 4, 4, 6, 6], [4, 4, 6, 6, 6])
    assert greedy.tolist() == [2] * 5
    data = GeneratedText(folder, sequences=7, sequence_length=8, end=5)
    whole = sum(len(data.dataset(split)) for split in ("train", "validation", "test"))
    assert whole == len(data._tokens) // 8 < 7  # texts that end early share windows


def test_real_text_is_held_out(folder, tmp_path):
    model = make_model(vocab_size=256)
    model.save_pretrained(folder)
    real = StandardLibraryText(sequence_length=16, max_bytes=2_000)
    data = GeneratedText(folder, sequences=6, sequence_length=16, real=real)
    data.prepare_data()
    data.setup("fit")
    assert len(data.dataset("train")) == 6
    assert data.dataset("validation") is real.dataset("validation")
    assert data.bytes_per_token == 1.0
    assert data.end is None
    small = make_model()
    small.save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match=r"real has 256 tokens and the model 13: give it the model's own tokenizer"):
        GeneratedText(str(tmp_path / "small"), real=real, sequence_length=16).dataset("train")


def fit(data, folder, module, *callbacks, **options):
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[*callbacks, ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)],
        **{"max_steps": 2, **options},
    )
    trainer.fit(module, data)
    return folder / f"step={trainer.global_step}.ckpt"


def test_a_trained_task_writes_and_learns(folder, tmp_path, monkeypatch):
    """From a checkpoint of CausalLM, float or quantized; the task takes its vocabulary from the data."""
    monkeypatch.setenv("QLIGHTNING_CACHE", str(tmp_path / "cache"))
    options = {"sequence_length": 8, "batch_size": 8, "texts_at_once": 39}
    data = GeneratedText(folder, **options)
    config = {key: value for key, value in CONFIG.items() if key != "vocab_size"}
    float_, quantized = CausalLM(config), CausalLM(config)
    first = fit(data, tmp_path / "float", float_)
    path = str(first)
    written = stream(GeneratedText(path, **options))
    float_.model.save_pretrained(tmp_path / "saved")
    assert torch.equal(written, stream(GeneratedText(str(tmp_path / "saved"), **options)))
    path = str(fit(data, tmp_path / "quantized", quantized, QATCallback("int2")))
    data = GeneratedText(path, **options)
    starts, greedy = (x.tolist() for x in data._plan())
    seed = seeded("texts", 0, 0).initial_seed()
    texts = torch.stack(write(quantized.model.eval(), starts, greedy, 8, seed=seed))
    splits = [stream(data, split) for split in ("train", "validation", "test")]
    assert sorted(torch.cat(splits).tolist()) == sorted(texts.tolist())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequences": 0}, r"sequences=0 writes nothing"),
        ({"sequence_length": 1}, r"a start token and one more"),
        ({"greedy": ()}, r"greedy=\(3, 4, 5\)"),
        ({"greedy": (0,)}, r"lengths from 1"),
        ({"temperature": 0.0}, r"temperature=1.0"),
        ({"start_tokens": [13]}, r"each from 0 to 12"),
        ({"sequence_length": 65}, r"64 positions: write sequence_length=64 or less"),
        ({"sequences": 1, "end": 5, "start_tokens": [5], "sequence_length": 8}, r"1 tokens were generated, fewer than"),
        ({"model": "./nowhere"}, r"model='./nowhere' does not exist"),
        ({"model": "nowhere.ckpt"}, r"model='nowhere.ckpt' does not exist"),
    ],
)
def test_errors(folder, options, message):
    with pytest.raises(ValueError, match=message):
        GeneratedText(**{"model": folder, **options}).dataset("train")


def test_checkpoints_of_others(tmp_path):
    torch.save({"state_dict": {}, "hyper_parameters": {"model": "a name"}}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"no checkpoint of qlightning.tasks.CausalLM: save the model with"):
        GeneratedText(os.fspath(tmp_path / "last.ckpt")).dataset("train")


def test_command_line():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    arguments = ["--data=qlightning.data.generated.GeneratedText", "--data.model=m", "--data.greedy=[2]"]
    real = ["--data.real=StandardLibraryText", "--data.real.max_bytes=9", "--data.start_tokens=[1,2]"]
    data = parser.instantiate(parser.parse_args([*arguments, *real])).data
    assert (data.greedy, data.start_tokens, data.real.max_bytes) == ((2,), (1, 2), 9)
