"""The command line: `qlightning fit --config configs/quickstart.yaml`.

A thin layer over LightningCLI: every option of the Trainer, the task and the datamodule is an option here, in YAML and
as `--trainer.max_steps 100`. Importing this module imports neither Lightning nor torch, so that `qlightning --help`
answers at once.
"""

import difflib
import inspect
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from itertools import chain
from typing import Any

COMMANDS = {
    "fit": "train, and validate on the way",
    "validate": "one pass over the validation data",
    "test": "one pass over the test data",
    "predict": "run the model over the prediction data",
    "calibrate": "find quantized weights from data, without training, and write a checkpoint",
    "export": "write a checkpoint as a model folder for a runtime, and prove the two equal",
    "verify": "prove again that an exported folder computes what was trained",
    "report": "a page of pictures and numbers of a checkpoint and its run",
    "bench": "what quantization costs on this machine, beside plain training and beside other tools",
    "methods": "the catalogue of published methods; with a name, what one of them is",
}

# what jsonargparse says about the types it tried, beside what is wrong
_BOILERPLATE = (
    "Does not validate",
    "Subtypes:",
    "Errors:",
    "Given value",
    "Expected a <class 'NoneType'>",
    "Expected a <class 'list'>",
    "Expected a path but",
)

USAGE = """usage: qlightning COMMAND [--config FILE ...] [--OPTION VALUE ...]

commands:
{commands}

A run is described by YAML files; later files and options given here win:
  qlightning fit --config configs/quickstart.yaml
  qlightning fit --config configs/quickstart.yaml --trainer.max_steps 100 --model.lr 1e-3
  qlightning fit --config configs/llm/llama.yaml --method LSQ --method.bits 3
  qlightning calibrate --config configs/quickstart.yaml --solver GPTQ --out calibrated.ckpt
  qlightning validate --config configs/quickstart.yaml --ckpt_path runs/quickstart/checkpoints/last.ckpt
  qlightning bench --schemes "int4-g32" --compile true
  qlightning export --checkpoint last.ckpt --format compressed-tensors --out model
  qlightning report --checkpoint last.ckpt --out report

  qlightning COMMAND --help                          all options of the Trainer, and how to name a model and its data
  qlightning COMMAND --model.help qlightning.tasks.CausalLM       the options of a model; --data.help for a datamodule
  qlightning COMMAND --config FILE --print_config    the whole run as one YAML file, without running it
  --traceback                                        with an error, show where in the code it was raised
"""


def main(args: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        args: The words after `qlightning`; those of the process when left out.

    Raises:
        SystemExit: Help was asked for (code 0), the options are wrong (2), or the run ended in an error that its
            message explains (1).
    """
    words = list(sys.argv[1:] if args is None else args)
    traceback = "--traceback" in words
    words = [word for word in words if word != "--traceback"]
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE.format(commands="\n".join(f"  {name:<10}{what}" for name, what in COMMANDS.items())), end="")
        sys.exit(0)
    if words[0] not in COMMANDS:
        _stop(f"{words[0]!r} is not a command{nearest(words[0], COMMANDS)}", code=2)
    try:
        _run(words, traceback=traceback)
        sys.stdout.flush()
    except BrokenPipeError:  # `qlightning methods | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left has nobody to go to


def _run(words: list[str], *, traceback: bool) -> None:
    if words[0] == "methods":
        print(_methods(words[1:]))
    elif words[0] == "bench":
        _stop_on_errors(lambda: _bench(words), words, traceback=traceback)
    elif words[0] in ("export", "verify"):
        _stop_on_errors(lambda: _prove(words), words, traceback=traceback)
    elif words[0] == "report":
        _stop_on_errors(lambda: _report(words), words, traceback=traceback)
    else:
        _stop_on_errors(lambda: _train(words), words, traceback=traceback)


def _prove(words: list[str]) -> None:
    """Export or verify, and print the proof; code 1 where it fails."""
    from qlightning.export.commands import export_command, verify_command

    proof = _call(export_command if words[0] == "export" else verify_command, words)
    print(proof.text())
    sys.exit(0 if proof.passed else 1)


def _report(words: list[str]) -> None:
    """Write the page of a checkpoint, and say where it is."""
    from qlightning.reporting.commands import report_command

    print(_call(report_command, words))


def _bench(words: list[str]) -> None:
    """Measure, and print the table."""
    from qlightning.benchmark.command import bench

    print(_call(bench, words).text())


def _call(command: Callable[..., Any], words: list[str]) -> Any:
    """What a function returns whose arguments are the options of a command."""
    from jsonargparse import auto_cli

    options = _as_options(words[1:])
    return auto_cli(command, args=options, as_positional=False, exit_on_error=False, prog=f"qlightning {words[0]}")


def _as_options(words: list[str]) -> list[str]:
    """`--force` as a flag and `--drop a --drop b` as a list, as one writes them."""
    options, dropped = [], []
    rest = iter(words)
    for word in rest:
        if word == "--drop":
            dropped.append(next(rest, ""))
        else:
            options.append("--force=true" if word == "--force" else word)
    return [*options, *([f"--drop={json.dumps(dropped)}"] if dropped else [])]


def _methods(names: list[str]) -> str:
    """The printed catalogue, or the whole docstrings of some methods. Imports nothing that takes time."""
    from qlightning.methods.catalogue import catalogue

    entries = {entry.name: entry for entry in catalogue()}
    if unknown := [name for name in names if name not in entries]:
        _stop(f"{unknown[0]!r} is not a method{nearest(unknown[0], entries)}", code=2)
    if names:
        return "\n\n".join(f"{name}\n{entries[name].docstring}" for name in names)
    width = max(len(name) for name in entries)
    lines = [f"{e.name:<{width}}  {e.summary}\n{'':<{width}}  {e.paper}" for e in entries.values()]
    return "\n".join([*lines, f"\n{len(lines)} methods; qlightning methods NAME says more of one"])


def interface(*, calibrates: bool = False) -> Any:
    """The class that parses and runs a command; made here because what it is made of takes seconds to import.

    Args:
        calibrates: Its fit ends, with a checkpoint, when a solver has found the quantized weights.
    """
    from lightning.pytorch import Trainer
    from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

    import qlightning.strategies.fsdp  # noqa: F401  # it registers its name with Lightning
    from qlightning.callbacks.calibration import Calibration, calibrating
    from qlightning.callbacks.checkpoint_io import keep_checkpoints_whole
    from qlightning.methods import Method, compose
    from qlightning.solvers import Solver

    class Interface(LightningCLI):
        """LightningCLI over any LightningModule and LightningDataModule, with errors raised instead of printed."""

        def __init__(self, args: ArgsType) -> None:
            super().__init__(
                args=args,
                save_config_kwargs={"overwrite": True},  # a run repeated into its folder replaces what lies there
                seed_everything_default=0,
                trainer_defaults={"default_root_dir": "runs"},
            )

        def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
            return super().init_parser(exit_on_error=False, **kwargs)

        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            what = "a published method, or several that compose; `qlightning methods` lists them"
            parser.add_argument("--method", type=Method | list[Method] | None, default=None, help=what)
            if calibrates:
                parser.add_argument("--solver", type=Solver, required=True, help="how weights are found, e.g. GPTQ")
                parser.add_argument("--out", type=str, required=True, help="the checkpoint that is written")

        def instantiate_trainer(self, **kwargs: Any) -> Trainer:
            method = self._get(self.config_init, "method")
            if method is not None:
                own = self._get(self.config_init, "trainer").get("callbacks") or []
                added = compose(*(method if isinstance(method, list) else [method]))
                # a method's callbacks come first: QATCallback must see the module before what copies or reports on it
                kwargs["callbacks"] = [*added, *(own if isinstance(own, list) else [own])]
            trainer = super().instantiate_trainer(**kwargs)
            keep_checkpoints_whole(trainer)
            if calibrates:
                calibrating(trainer, self._get(self.config_init, "solver"))
                trainer.callbacks.append(Calibration(self._get(self.config_init, "out")))  # type: ignore[attr-defined]
            return trainer

        def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
            self.config = parser.parse_args(args)

        def _parse_ckpt_path(self) -> None:
            # What runs is what the command line says; a checkpoint brings weights and progress. LightningCLI would let
            # the checkpoint's hyperparameters overrule the options given here, without a word.
            return

    return Interface


def _train(words: list[str]) -> None:
    """Run a command of the Trainer."""
    for part, names in _parts().items():
        for name in names:
            getattr(import_module(part), name)  # jsonargparse takes the bare name of a class that has been imported
    calibrates = words[0] == "calibrate"
    interface(calibrates=calibrates)(["fit", *words[1:]] if calibrates else words)


def _stop_on_errors(command: Callable[[], None], words: list[str], *, traceback: bool) -> None:
    """Run a command; what a user can put right becomes one line and an exit code."""
    warnings.filterwarnings("ignore", ".isinstance.treespec, LeafSpec", FutureWarning)  # Lightning 2.6 under torch 2.13
    for name in ("torchao", "torch.utils._pytree"):  # kernels for other machines, enums of others
        logging.getLogger(name).setLevel(logging.ERROR)
    from jsonargparse import ArgumentError
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    try:
        command()
    except BrokenPipeError:
        raise
    except ArgumentError as error:
        if traceback:
            raise
        _stop(f"{_condensed(str(error))}\n  for all options: qlightning {words[0]} --help", code=2)
    except (ValueError, MisconfigurationException, OSError, ModuleNotFoundError) as error:
        if traceback:
            raise
        _stop(f"{_condensed(str(error))}\n  to see where it was raised: add --traceback", code=1)


def _parts() -> dict[str, list[str]]:
    """The classes that go by their bare name in YAML and options, by the package that has them."""
    from qlightning.methods.catalogue import catalogue

    packages = ("qlightning.tasks", "qlightning.data", "qlightning.schedules", "qlightning.solvers")
    named = {part: [name for name in import_module(part).__all__ if name[0].isupper()] for part in packages}
    return named | {"qlightning.methods": [entry.name for entry in catalogue()]}


def _condensed(message: str) -> str:
    """jsonargparse's message on one line, without its report on the types it tried, and with the nearest right name."""
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    text = " ".join(line for line in lines if line and not line.startswith(_BOILERPLATE))
    text = re.sub(r"\b(?:fit|validate|test|predict)\.(model|data|method)\b", r"--\1", text)
    if found := re.search(r".*class_path '([\w.]+)'.*?Option '(\w+)' is not accepted", text):
        module, _, name = found[1].rpartition(".")
        return text + nearest(found[2], _options(getattr(import_module(module), name)))
    if found := re.search(r"Expected a dot import path string: (\w+)$", text):
        return text + nearest(found[1], chain.from_iterable(_parts().values()))
    return text


def _options(kind: type) -> list[str]:
    """The names that a class takes, by itself and through the `**options` that it hands on."""
    signatures = [inspect.signature(c.__init__) for c in kind.__mro__ if "__init__" in vars(c)]  # type: ignore[misc]
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [name for s in signatures for name, p in s.parameters.items() if p.kind in named and name != "self"]


def nearest(word: str, names: Iterable[str]) -> str:
    """A question that names the nearest of `names`, or else all of them."""
    names = list(names)
    found = difflib.get_close_matches(word, names, n=1)
    return f"; did you mean {found[0]!r}?" if found else f"; there are {', '.join(names)}"


def _stop(message: str, *, code: int) -> None:
    print(f"qlightning: error: {message}", file=sys.stderr)
    sys.exit(code)
