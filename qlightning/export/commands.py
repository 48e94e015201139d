"""`qlightning export` and `qlightning verify` as functions."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn

import qlightning
from qlightning.export.artifact import check_free, publish, read_manifest, write_manifest
from qlightning.export.checkpoint import load_trained, run_data
from qlightning.export.inputs import Inputs, held_out, random_inputs
from qlightning.export.merge import merge_adapters
from qlightning.export.peft import Adapters
from qlightning.export.pretrained import copy_tokenizer
from qlightning.export.target import Plan, Target, make_plan, target_named
from qlightning.export.trained import Trained
from qlightning.export.verify import Proof, compare

Data = LightningDataModule | Iterable[Any] | None

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export_checkpoint(
    checkpoint: str | Path,
    format: str,
    out: str | Path,
    *,
    model: str | type[LightningModule] | None = None,
    data: Data = None,
    dtype: str | None = None,
    drop: Iterable[str] = (),
    force: bool = False,
    batches: int = 2,
    options: dict[str, Any] | None = None,
    tokenizer: str | Path | None = None,
) -> Proof:
    """Write a self-contained model folder from a checkpoint, and prove that it computes what was trained.

    Args:
        checkpoint: A Lightning checkpoint file.
        format: Name of a target, for example "plain" or "compressed-tensors".
        out: The folder to be made.
        model: Dotted path of the LightningModule's class; not needed for qlightning's own tasks.
        data: A datamodule or batches for the proof. Left out: the run's own datamodule, where its config.yaml lies
            beside the checkpoint and names one of qlightning's, and else random inputs from a seed.
        dtype: In which the artifact computes, "float32" or "bfloat16"; as trained when left out.
        drop: What may be lost where the target has no place for it: placements, or "codes".
        force: Replace an earlier export at `out`.
        batches: How many batches the proof runs.
        options: Options of the target.
        tokenizer: Folder of the tokenizer that goes with the model, to be copied beside it.

    Returns:
        The proof. It is also in the folder's manifest, `qlightning.json`.

    Raises:
        ValueError: Something would be lost that `drop` does not name, the proof fails, or `out` exists. Nothing is
            left behind.
    """
    check_free(Path(out).absolute(), force=force)  # before anything is loaded
    module = merge_adapters(load_trained(checkpoint, model=model), in_place=True)
    data = run_data(checkpoint) if data is None else data
    return export_module(
        module,
        format,
        out,
        data=data,
        dtype=dtype,
        drop=drop,
        force=force,
        batches=batches,
        options=options,
        tokenizer=tokenizer,
        source=str(checkpoint),
    )


def export_module(
    module: nn.Module,
    format: str,
    out: str | Path,
    *,
    data: Data = None,
    dtype: str | None = None,
    drop: Iterable[str] = (),
    force: bool = False,
    batches: int = 2,
    options: dict[str, Any] | None = None,
    tokenizer: str | Path | None = None,
    source: str = "",
) -> Proof:
    """As `export_checkpoint`, for a module in memory, which is left as it is.

    Args:
        module: A module with converted layers, in eval mode.
        format: Name of a target.
        out: The folder to be made.
        data: A datamodule or batches for the proof; random inputs when left out.
        dtype: In which the artifact computes; as trained when left out.
        drop: What may be lost.
        force: Replace an earlier export at `out`.
        batches: How many batches the proof runs.
        options: Options of the target.
        tokenizer: Folder of the tokenizer that goes with the model, to be copied beside it.
        source: Where the module came from, for the manifest.
    """
    check_free(Path(out).absolute(), force=force)
    target, beside = make_target(format, options), None if tokenizer is None else Path(tokenizer)
    plan, adapters = _planned(module, target, dtype=dtype, drop=drop, tokenizer=beside)
    inputs = _inputs(plan.trained, data, batches)
    with publish(Path(out), force=force) as folder:
        with adapters.off():
            target.write(plan._replace(example=inputs.calls[0]), folder)
        adapters.write(folder)
        if beside is not None:
            copy_tokenizer(beside, folder)
        proof = prove(target, plan, folder, inputs, adapters=adapters)
        if not proof.passed:
            raise ValueError(
                f"{target.name}: the artifact does not compute what was trained, so it is not kept\n{proof.text()}"
            )
        write_manifest(folder, _facts(target, plan, options, source, proof))
    return proof


def verify(
    checkpoint: str | Path,
    artifact: str | Path,
    *,
    model: str | type[LightningModule] | None = None,
    data: Data = None,
    batches: int = 2,
) -> Proof:
    """Prove again that an artifact computes what was trained.

    Args:
        checkpoint: The Lightning checkpoint that it was made from.
        artifact: The folder.
        model: Dotted path of the LightningModule's class; not needed for qlightning's own tasks.
        data: A datamodule or batches; as for `export_checkpoint` when left out.
        batches: How many batches to run.

    Raises:
        ValueError: The folder is not whole, or no export of such a model. A proof that fails is returned, not raised.
    """
    module = merge_adapters(load_trained(checkpoint, model=model), in_place=True)
    return verify_module(module, artifact, data=run_data(checkpoint) if data is None else data, batches=batches)


def export_command(
    checkpoint: str,
    format: str,
    out: str,
    *,
    model: str | None = None,
    data: LightningDataModule | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    drop: list[str] | None = None,
    force: bool = False,
    batches: int = 2,
    options: dict[str, Any] | None = None,
    tokenizer: str | None = None,
) -> Proof:
    """`qlightning export`: `export_checkpoint` with what a command line can say.

    Args:
        checkpoint: A Lightning checkpoint file.
        format: Name of a target, for example "plain" or "compressed-tensors".
        out: The folder to be made.
        model: Dotted path of the LightningModule's class; not needed for qlightning's own tasks.
        data: A datamodule for the proof; the run's own, or random inputs, when left out.
        dtype: In which the artifact computes; as trained when left out.
        drop: What may be lost where the target has no place for it: placements, or "codes".
        force: Replace an earlier export at `out`.
        batches: How many batches the proof runs.
        options: Options of the target.
        tokenizer: Folder of the tokenizer that goes with the model, to be copied beside it.
    """
    return export_checkpoint(
        checkpoint, format, out, model=model, data=data, dtype=dtype, drop=drop or (), force=force, batches=batches,
        options=options,
        tokenizer=tokenizer,
    )  # fmt: skip


def verify_command(
    checkpoint: str,
    artifact: str,
    *,
    model: str | None = None,
    data: LightningDataModule | None = None,
    batches: int = 2,
) -> Proof:
    """`qlightning verify`: `verify` with what a command line can say.

    Args:
        checkpoint: The Lightning checkpoint that the artifact was made from.
        artifact: The folder.
        model: Dotted path of the LightningModule's class; not needed for qlightning's own tasks.
        data: A datamodule for the proof; the run's own, or random inputs, when left out.
        batches: How many batches the proof runs.
    """
    return verify(checkpoint, artifact, model=model, data=data, batches=batches)


def verify_module(module: nn.Module, artifact: str | Path, *, data: Data = None, batches: int = 2) -> Proof:
    """As `verify`, for a module in memory."""
    folder = Path(artifact)
    facts = read_manifest(folder)
    if lacking := {"format", "options", "dtype", "drop"} - facts.keys():
        raise ValueError(f"{folder} is no export of qlightning: its manifest does not say {min(lacking)}")
    target = make_target(facts["format"], facts["options"])
    plan, adapters = _planned(module, target, dtype=facts["dtype"], drop=facts["drop"])
    return prove(target, plan, folder, _inputs(plan.trained, data, batches), adapters=adapters)


def prove(target: Target, plan: Plan, folder: Path, inputs: Inputs, *, adapters: Adapters) -> Proof:
    """Load the artifact in its own runtime and compare it with the trained model."""
    with adapters.off():
        runtime = target.load(folder, plan.trained)
    return compare(plan, adapters.load(runtime, folder, inputs.calls[0], plan.dtype), inputs, target.tolerance(plan))


def _planned(
    module: nn.Module, target: Target, *, dtype: str | None, drop: Iterable[str], tokenizer: Path | None = None
) -> tuple[Plan, Adapters]:
    """What is written of a module, and the adapters of PEFT that are written beside it."""
    merged = merge_adapters(module)
    adapters = Adapters(merged)
    with adapters.off():
        plan = make_plan(
            target,
            Trained(merged),
            dtype=dtype_named(dtype),
            drop=drop,
            tokenizer=tokenizer,
            adapters=bool(adapters),
        )
    return plan, adapters


def _inputs(trained: Trained, data: Data, batches: int) -> Inputs:
    return random_inputs(trained, batches=batches) if data is None else held_out(trained, data, batches=batches)


def make_target(format: str, options: dict[str, Any] | None = None) -> Target:
    """A target by name, with its options. Raises ValueError for an unknown name or option."""
    cls = target_named(format)
    try:
        return cls(**(options or {}))
    except TypeError as error:
        raise ValueError(f"options of {format}: {error}") from None


def dtype_named(name: str | None) -> torch.dtype | None:
    """The dtype of that name. Raises ValueError for one that no artifact computes in."""
    if name is not None and name not in _DTYPES:
        raise ValueError(f"dtype={name!r}: write {', '.join(map(repr, _DTYPES))}, or leave it out for the trained one")
    return None if name is None else _DTYPES[name]


def _facts(target: Target, plan: Plan, options: dict[str, Any] | None, source: str, proof: Proof) -> dict[str, Any]:
    return {
        "format": target.name,
        "options": options or {},
        "dtype": str(plan.dtype).removeprefix("torch."),
        "drop": list(plan.dropped),
        "dropped": plan.dropped,
        "checkpoint": Path(source).name,
        "versions": {"qlightning": qlightning.__version__, "torch": torch.__version__},
        "proof": proof.plain(),
    }
