"""The README: its program runs, and what it names exists."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset

import qlightning
from qlightning import QATCallback, Quantizer, parse
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
