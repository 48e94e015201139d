"""The command line, in this process through `main(args)`, and every YAML file of configs/."""

import io
import subprocess
import sys
from pathlib import Path

import lightning.pytorch  # noqa: F401  # here, or its log handler keeps the captured stderr of the first test that runs
import pytest
import torch
import yaml
from datasets import Dataset, Features, Image, Value
from lightning.pytorch import Trainer
from PIL import Image as Picture

from qlightning import convert, tasks
from qlightning.cli import main
from qlightning.schedules import Schedule

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "methods")

pytestmark = [
    # both are about how Lightning 2.6 calls jsonargparse 4.53
    pytest.mark.filterwarnings(r"ignore:\s*.*was deprecated in v4:DeprecationWarning"),
    pytest.mark.filterwarnings(r"ignore:\s*By default only one Jsonargparse:DeprecationWarning"),
]

BORING = ["--model", "lightning.pytorch.demos.boring_classes.BoringModel"]
BORING += ["--data", "lightning.pytorch.demos.boring_classes.BoringDataModule"]
LAMA = ["--data=Digits", "--model=CausalLM", '--model.model={"model_type": "lama", "vocab_size": 9}']
QUIET = ["--trainer.accelerator=cpu", "--trainer.max_epochs=1", "--trainer.enable_progress_bar", "false"]

# what makes a config tiny: the sizes of its model and data, its data where they are not embedded, and five steps
TINY = {
    "quickstart.yaml": ["--data.max_bytes=20000", "--data.sequence_length=32", "--data.batch_size=4"],
    "llm/llama.yaml": [
        "--data.path={text}",
        "--data.tokenizer=bytes",
        "--data.sequence_length=9",
        "--data.batch_size=4",
    ],
    "float/llama.yaml": ["--data.max_bytes=20000", "--data.sequence_length=32", "--data.batch_size=4"],
    "float/vit.yaml": ["--data.path={pictures}", "--data.batch_size=4"],
    "float/resnet.yaml": ["--data.path={pictures}", "--data.batch_size=4"],
    "float/unet.yaml": ["--data.batch_size=8"],
    "vit/digits.yaml": ["--data.batch_size=8"],
    "vit/vit.yaml": ["--data.path={pictures}", "--data.batch_size=4"],
    "diffusion/digits.yaml": ["--data.batch_size=8", "--model.sampling_steps=2", "--model.sample_every=1"],
    "diffusion/dit.yaml": ["--data.path={pictures}", "--data.batch_size=4", "--model.sampling_steps=2"],
}
TINY_MODELS = {
    "llama": ["hidden_size=16", "intermediate_size=32", "num_hidden_layers=1", "num_attention_heads=2"],
    "vit": ["hidden_size=16", "intermediate_size=32", "num_hidden_layers=1", "num_attention_heads=2"],
    "resnet": ["embedding_size=8", "hidden_sizes=[8,8]", "depths=[1,1]"],
    "UNet2DModel": ["block_out_channels=[8,8]"],
    "DiTTransformer2DModel": ["num_layers=1", "num_attention_heads=2", "attention_head_dim=8"],
}


def stop(words, capsys) -> tuple[int, str]:
    """The exit code of a command that ends the process, and what it says."""
    with pytest.raises(SystemExit) as stopped:
        main(words)
    said = capsys.readouterr()
    return stopped.value.code, said.out + said.err


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT / "configs"))


def tiny(path: Path, folder: Path) -> list[str]:
    """The words that fit a config for five steps, on data written to `folder` where the config's own may be absent."""
    model = yaml.safe_load(path.read_text())["model"]["init_args"]["model"]
    kind = model.get("model_type") or model["_class_name"]
    words = ["fit", "--config", str(path), *QUIET, "--trainer.limit_train_batches=5"]
    words += ["--trainer.limit_val_batches=1", "--trainer.val_check_interval=5", "--trainer.check_val_every_n_epoch=1"]
    words += ["--trainer.precision=32", "--trainer.log_every_n_steps=1", "--trainer.enable_model_summary=false"]
    words += ["--trainer.logger.save_dir", str(folder / "runs"), "--trainer.callbacks=LearningRateMonitor"]
    words += ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_last=true"]
    words += [f"--model.model.{size}" for size in TINY_MODELS[kind]]
    return words + [word.format(text=folder / "text", pictures=folder / "pictures") for word in TINY[name_of(path)]]


@pytest.fixture
def data(tmp_path) -> Path:
    """A folder with a text and a picture data set, in parquet as the hub has them."""
    text = Dataset.from_dict({"text": [f"document {i} says nothing new at all, at length\n" for i in range(60)]})
    buffer = io.BytesIO()
    Picture.new("RGB", (32, 32), (10, 200, 90)).save(buffer, "PNG")
    rows = {"img": [{"bytes": buffer.getvalue(), "path": None}] * 24, "label": [0, 1, 2] * 8}
    pictures = Dataset.from_dict(rows, features=Features({"img": Image(), "label": Value("int64")}))
    for name, rows in (("text", text), ("pictures", pictures)):
        for split in ("train", "validation", "test"):
            (tmp_path / name).mkdir(exist_ok=True)
            rows.to_parquet(tmp_path / name / f"{split}.parquet")
    return tmp_path


def test_there_are_as_many_configs_as_this_file_knows():
    assert len(CONFIGS) == 10
    assert [name_of(path) for path in CONFIGS] == sorted(TINY)


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_every_config_parses_in_full(path, capsys):
    code, said = stop(["fit", "--config", str(path), "--print_config"], capsys)
    assert code == 0
    printed, written = yaml.safe_load(said), yaml.safe_load(path.read_text())
    assert printed["model"]["class_path"] == written["model"]["class_path"]
    for part in ("model", "data"):
        given = written[part]["init_args"]
        given.pop("schedule", None)  # printed with its defaults
        assert printed[part]["init_args"].items() >= given.items()


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_every_config_fits_five_steps(path, data, monkeypatch):
    monkeypatch.chdir(data)
    main(tiny(path, data))
    (checkpoint,) = data.rglob("last.ckpt")
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 5
    given = yaml.safe_load(path.read_text())["model"]
    task = getattr(tasks, given["class_path"].rpartition(".")[2]).load_from_checkpoint(checkpoint)
    assert task.schedule == Schedule.of(given["init_args"]["schedule"])
    assert task.hparams["lr"] == given["init_args"]["lr"]
    (metrics,) = data.rglob("metrics.csv")
    assert {"train_loss", "val_loss"} <= set(metrics.read_text().splitlines()[0].split(","))
    (saved,) = data.rglob("config.yaml")
    assert yaml.safe_load(saved.read_text())["seed_everything"] == 0


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # the validation has a run folder of its own
def test_options_count_beside_a_checkpoint(data, monkeypatch):
    # LightningCLI would take the checkpoint's hyperparameters instead, without a word
    monkeypatch.chdir(data)
    words = tiny(ROOT / "configs" / "vit" / "digits.yaml", data)
    main(words)
    (checkpoint,) = data.rglob("last.ckpt")
    words = ["validate", *(word.replace(str(data / "runs"), str(data / "again")) for word in words[1:])]
    main([*words, "--ckpt_path", str(checkpoint), "--model.label_smoothing=0.5"])
    (saved,) = (data / "again").rglob("config.yaml")
    assert yaml.safe_load(saved.read_text())["model"]["init_args"]["label_smoothing"] == 0.5


def test_a_users_own_module_and_data_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["fit", *BORING, *QUIET, "--trainer.fast_dev_run=2", "--trainer.logger=false"])
    assert not list(tmp_path.iterdir())


def test_a_method_goes_by_its_name(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO")
    main(["fit", *BORING, *QUIET, "--trainer.fast_dev_run=2", "--method", "LSQ", "--method.bits", "3"])
    assert "weight int3-lsq" in caplog.text


def test_the_catalogue_is_printed_and_one_of_it_in_full(capsys):
    main(["methods"])
    said = capsys.readouterr().out
    assert "LSQ" in said
    assert "arXiv 1902.08153" in said
    main(["methods", "LSQ"])
    assert "Args:" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_names_the_commands(words, capsys):
    code, said = stop(words, capsys)
    assert code == 0
    for command in ("fit", "validate", "test", "predict", "--print_config"):
        assert command in said


def test_help_of_a_command_and_of_a_model(capsys):
    code, said = stop(["fit", "--help"], capsys)
    assert code == 0
    assert "--trainer.max_steps" in said
    code, said = stop(["fit", "--model.help", "CausalLM"], capsys)
    assert code == 0
    assert "Peak learning rate of AdamW" in said


def test_help_imports_neither_torch_nor_lightning():
    code = "import sys; from qlightning.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "print([m for m in ('torch', 'lightning', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_reader_that_has_read_enough_is_no_error():
    command = [sys.executable, "-c", "from qlightning.cli import main; main()", "methods"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as done:
        assert done.stdout is not None
        assert done.stderr is not None
        done.stdout.close()
        assert done.stderr.read() == ""
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["fut"], 2, "'fut' is not a command; did you mean 'fit'?"),
        (["xyz"], 2, "there are fit, validate, test, predict"),
        (["methods", "LSK"], 2, "did you mean 'LSQ'?"),
        (["fit", *BORING, "--method", "LSK"], 2, "did you mean 'LSQ'?"),
        (["fit", *BORING, "--method", "LSQ", "--method.bit", "3"], 2, "did you mean 'bits'?"),
        (["fit"], 2, "required: --model"),
        (["fit", *BORING, "--foo", "3"], 2, "unrecognized arguments: --foo"),
        (["fit", "--config", "nowhere.yaml"], 2, "does not exist"),
        (["fit", "--model", "CausalM"], 2, "did you mean 'CausalLM'?"),
        (["fit", "--model", "CausalLM", "--model.lrr", "3"], 2, "did you mean 'lr'?"),
        (["fit", *BORING[:2], "--data=Digits", "--data.flp=0.5"], 2, "did you mean 'flip'?"),
        (["fit", "--model", "CausalLM", "--model.lr", "abc"], 2, "Got value: abc"),
        (["fit", "--model", "CausalLM", "--model.schedule", "Cosin"], 2, "did you mean 'Cosine'?"),
        (["fit", *BORING, "--trainer.max_steps", "many"], 2, "Got value: many"),
        (["fit", *LAMA], 1, "did you mean 'llama'?"),
    ],
)
def test_errors_are_one_line_that_names_the_right_word(words, code, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stopped, said = stop([*words, *(QUIET if code == 1 else [])], capsys)
    assert stopped == code
    (line,) = [line for line in said.splitlines() if line.startswith("qlightning: error:")]
    assert message in line
    assert "Traceback" not in said


def test_traceback_raises_the_error_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="did you mean 'llama'"):
        main(["fit", *LAMA, *QUIET, "--traceback"])


def test_an_export_is_proven_and_verified_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "vocab_size": 16,
    }
    task = tasks.CausalLM({**model, "num_attention_heads": 2, "max_position_embeddings": 32})
    task.configure_model()
    convert(task, {"*": "int4-g32", "lm_head": {"weight": "int8", "output": "int8-token"}})
    trainer = Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
    trainer.strategy.connect(task)
    trainer.save_checkpoint("last.ckpt")
    words = ["export", "--checkpoint", "last.ckpt", "--format", "plain", "--out", "model"]
    code, said = stop(words, capsys)
    assert code == 1
    assert "--drop output" in said
    for again in (["--drop", "output"], ["--force", "--drop", "output"]):
        code, said = stop([*words, *again], capsys)
        assert (code, "passed" in said) == (0, True)
    code, said = stop(["verify", "--checkpoint", "last.ckpt", "--artifact", "model"], capsys)
    assert (code, "passed" in said) == (0, True)
