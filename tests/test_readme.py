"""The README: its program runs, and what it names exists."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset

import qlightning
from qlightning import QATCallback, Quantizer, parse
from qlightning.cli import main
from qlightning.numerics import LSQ, Int, Learned, LSQStep, PerGroup

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator")
def test_the_first_program_runs(tmp_path: Path) -> None:
    program = re.search(r"```python\n(.*?)```", README, re.S)
    assert program is not None
    assert README[: program.end()].count("\n") < 30
    model = BoringModel()
    model.layer = torch.nn.Linear(128, 2)  # a width that groups of 128 divide
    data = LightningDataModule.from_datasets(RandomDataset(128, 16), RandomDataset(128, 16), batch_size=4)
    options = "accelerator='cpu', max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False"
    code = program[1].replace("Trainer(callbacks", f"Trainer({options}, callbacks")
    exec(code, {"any_lightning_module": model, "any_datamodule": data})
    assert isinstance(model.layer.weight_quantizer, Quantizer)
    assert isinstance(model.layer.input_quantizer, Quantizer)


def test_the_two_commands_stand_in_the_first_30_lines() -> None:
    first = "\n".join(README.splitlines()[:30])
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test"):
        assert f"make {target}" in first
        assert re.search(rf"^{target}:", makefile, re.M)


def test_named_files_exist() -> None:
    names = set(re.findall(r"`((?:qlightning|configs|tests)/[\w/.]+)`", README)) | {"constraints.txt", "LICENSE"}
    assert len(names) >= 8
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_named_specs_are_specs() -> None:
    words = re.findall(r"`([a-z0-9]+(?:-[a-z0-9.]+)*)`", README)
    specs = [word for word in words if re.match(r"(u?int\d|fp\d|nvfp|mxfp|nf4|ternary|binary|log\d)", word)]
    assert len(specs) > 15
    assert all(parse(spec) for spec in specs)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A Llama with a tokenizer in my/llama, and texts in my/corpus."""
    import tokenizers
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    text = [f"document {i} says nothing new at all, at length\n" * 4 for i in range(40)]
    own = tokenizers.ByteLevelBPETokenizer()
    own.train_from_iterator(text, vocab_size=270, special_tokens=["</s>"], show_progress=False)
    folder = tmp_path / "my" / "llama"
    PreTrainedTokenizerFast(tokenizer_object=own._tokenizer, eos_token="</s>").save_pretrained(folder)
    config = LlamaConfig(
        **{"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2},
        **{"vocab_size": 272, "max_position_embeddings": 64, "eos_token_id": 0, "bos_token_id": None},
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    corpus = tmp_path / "my" / "corpus"
    corpus.mkdir()
    for split in ("train", "validation", "test"):
        Dataset.from_dict({"text": text}).to_parquet(corpus / f"{split}.parquet")
    return tmp_path


@pytest.mark.filterwarnings(r"ignore:\s*.*was deprecated in v4:DeprecationWarning")
@pytest.mark.filterwarnings(r"ignore:\s*By default only one Jsonargparse:DeprecationWarning")
@pytest.mark.parametrize(("number", "weights"), [(0, "model-vllm/model.safetensors"), (1, "model-gguf/model.gguf")])
def test_from_a_llama_to_what_serves_it(
    number: int, weights: str, llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    section = README[README.index("### From a fine-tuned Llama") :]
    fit, export = re.findall(r"```bash\n(.*?)```", section, re.S)[number].strip().splitlines()
    assert export.startswith("qlightning export ")
    monkeypatch.chdir(llama)
    small = (
        "--data.sequence_length=16 --data.batch_size=2 --trainer.max_steps=2 --trainer.val_check_interval=2 "
        "--trainer.limit_val_batches=1 --trainer.accelerator=cpu --trainer.enable_progress_bar=false "
        "--trainer.enable_model_summary=false"
    )
    main(shlex.split(f"{fit} {small}".replace("configs/", f"{ROOT}/configs/"))[1:])
    with pytest.raises(SystemExit) as stopped:
        main(shlex.split(export)[1:])
    assert stopped.value.code == 0, capsys.readouterr().err
    assert (llama / weights).is_file()
    assert "passed" in capsys.readouterr().out


def test_the_three_depths_say_what_they_say() -> None:
    QATCallback(weight="int4-g128", input="int8-token")
    QATCallback(weight=Quantizer(Int(4), PerGroup(128), scale=Learned(LSQStep()), gradient=LSQ()))
    rules = {"*.down_proj": "int8", "type:Conv2d": {"weight": "int8", "input": "int8-token"}, "layers.0.*": None}
    assert QATCallback(weight="int4-g32", rules=rules).rules.keys() >= rules.keys()
    for text in (
        "scale=Learned(LSQStep()), gradient=LSQ()",
        '"type:Conv2d": {"weight": "int8", "input": "int8-token"}',
    ):
        assert text in README


def test_composed_methods_and_phases_are_calls_that_work() -> None:
    from qlightning import Phase
    from qlightning.methods import AWQ, LSQ, CooldownFusion, compose

    for call in (
        "compose(AWQ(bits=None), LSQ(bits=4), CooldownFusion(start=0.8))",
        'QATCallback(weight="int8-g32", anneal={0.5: "int6-g32", 0.8: "int4-g32"})',
    ):
        assert call in README
        eval(call, {**globals(), "compose": compose, "AWQ": AWQ, "LSQ": LSQ, "CooldownFusion": CooldownFusion})
    found = re.search(r"schedule=(\[Phase.*?\])\)`", README)
    assert found is not None
    QATCallback(weight="int4-g32", input="int8-tensor-lsq", schedule=eval(found[1], {"Phase": Phase}))


def test_the_yaml_is_read() -> None:
    found = re.search(r"```yaml\n(.*?)```", README, re.S)
    assert found is not None
    (callback,) = yaml.safe_load(found[1])["trainer"]["callbacks"]
    assert callback["class_path"] == "qlightning.QATCallback"
    assert QATCallback(**callback["init_args"]).start == 0.8


def test_public_names_are_there() -> None:
    assert all(getattr(qlightning, name) is not None for name in qlightning.__all__)
    with pytest.raises(AttributeError, match="it has"):
        qlightning.NoSuchName  # noqa: B018
    assert issubclass(QATCallback, Callback)
