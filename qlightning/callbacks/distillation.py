"""DistillationCallback: any LightningModule learns from a frozen teacher, without touching its code."""

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from qlightning.callbacks.extra_loss import ExtraLoss
from qlightning.callbacks.heads import HeadPair, heads_of
from qlightning.callbacks.teacher import SELF, Teacher, build, student_root
from qlightning.losses.head import Reached
from qlightning.losses.loss import Comparison
from qlightning.losses.soft import KL, OnLogits
from qlightning.losses.taps import ITSELF, Site, Taps, partner, sites


class _Pair(NamedTuple):
    student: Site
    teacher: Site


class DistillationCallback(ExtraLoss):
    """Adds the distance between a student's outputs and a frozen teacher's to the loss, or puts it in its place.

    Example::

        Trainer(callbacks=[QATCallback("int4-g128"), DistillationCallback(task_weight=0.0)])  # logits only
        DistillationCallback(
            "runs/float/last.ckpt",
            losses={"forward": KL(temperature=2.0), "layers.*": MSE(normalize="length")},
            weight={"forward": 1.0, "layers.*": 0.1},
            task_weight=1.0,
        )

    The teacher is in eval mode, gets no gradient, logs nothing, and is part of neither the module nor its checkpoints.
    A teacher of the student's own kind repeats the student's `training_step` on the same batch with the same random
    numbers (so a diffusion teacher sees the same noise, if that is drawn before any dropout); with `at` it is instead
    asked whatever that submodule of the student is asked.

    The teacher "self" is the module when the run begins, in float even where QATCallback quantizes from step 0 on. It
    is written into the folder of the checkpoints once, `teacher-<digest>.safetensors`, when the first checkpoint is
    saved; a resumed run reads it from there and refuses to go on without it. Of every teacher, checkpoints hold a
    digest.

    Args:
        teacher: "self"; the path of a checkpoint of the student's class; or a module: a LightningModule whose
            `training_step` takes the student's batches, or, with `at`, any module.
        task_weight: What the task's own loss is multiplied by: 0.0 replaces it, 1.0 adds to it.
        losses: A loss on the output of the module's `forward`, or losses by pattern: globs on dotted names of
            submodules or any tail of them ("layers.*", where "*" is any text without a dot), "forward" for the module
            itself, and a suffix ":key" to pick from an output that is no tensor. Over the submodules of one pattern the
            mean is taken. `KL()` on the module's output when left out.
        weight: What the loss is multiplied by, or each loss, by pattern.
        pairs: Patterns of the teacher's names where they differ, by the student's: {"layers.*": "encoder.layers.*"}.
        at: Submodule of the student that the teacher stands beside; all names are then relative to it.
        mask: Key of the batch that tells which tokens count, for example "attention_mask"; its shape is that of what is
            compared, without features.
        folder: Where the teacher "self" is written; that of the checkpoints when left out.
        name: Under which the loss is logged, before `weight` where that is one number.
        chunked_loss: How many tokens' logits of student and teacher are in memory at once, for example 1024; those of
            all tokens when left out. It is for `KL` and `SoftCrossEntropy` of a causal language model of transformers
            or a module that holds one: what goes into the heads is kept, the teacher's step ends there, and both heads
            are asked piece by piece after the step and once more in backward. Values are the same up to how
            a product of fewer rows is summed. The student's own step is its own affair: with qlightning's task,
            CausalLM(..., chunked_loss=1024), it stores no logits either.

    Raises:
        ValueError: From the constructor for wrong weights and patterns; from fit for names that match nothing, shapes
            that differ, a teacher that shares parameters with the student, a resume without its teacher, and
            `chunked_loss` where no logits can be had in pieces.
    """

    def __init__(
        self,
        teacher: str | nn.Module = SELF,
        *,
        task_weight: float,
        losses: Comparison | dict[str, Comparison] | None = None,
        weight: float | dict[str, float] = 1.0,
        pairs: dict[str, str] | None = None,
        at: str | None = None,
        mask: str | None = None,
        folder: str | None = None,
        name: str = "distillation",
        chunked_loss: int | None = None,
    ) -> None:
        self.losses: dict[str, Comparison] = losses if isinstance(losses, dict) else {ITSELF: losses or KL()}
        if not self.losses:
            raise ValueError("losses={} compares nothing; write for example losses={'forward': KL()}")
        self.weights: dict[str, float] = dict.fromkeys(self.losses, 1.0) | (weight if isinstance(weight, dict) else {})
        super().__init__(weight=1.0 if isinstance(weight, dict) else weight, name=name, task_weight=task_weight)
        self.pairs = dict(pairs or {})
        for option, patterns in (("weight", self.weights), ("pairs", self.pairs)):
            if unknown := [pattern for pattern in patterns if pattern not in self.losses]:
                known = ", ".join(repr(pattern) for pattern in self.losses)
                raise ValueError(f"{option} names {unknown[0]!r}, for which there is no loss; there are {known}")
        if not all(value > 0 for value in self.weights.values()):
            raise ValueError(f"weight={weight}: all above 0; leave a loss that is not wanted out of losses")
        if chunked_loss is not None and chunked_loss < 1:
            raise ValueError(f"chunked_loss={chunked_loss}: at least 1 token at once, for example chunked_loss=1024")
        self.teacher, self.at, self.mask, self.folder = teacher, at, mask, folder
        self.chunked_loss = chunked_loss
        self._teacher: Teacher | None = None
        self._pairs: dict[str, list[_Pair]] = {}
        self._heads: HeadPair | None = None
        self._resumed: dict[str, Any] | None = None
        self._writes, self._folder = False, Path()

    @property
    def state_key(self) -> str:
        return f"DistillationCallback[{self.name}]"

    # --- the teacher ---

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._resumed = None

    def prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        goes_on = trainer.global_step > 0 and trainer.ckpt_path is None  # the same Trainer fits on
        if self._teacher is None or not goes_on:
            self._teacher = None  # memory for the next
            self._teacher = Teacher(build(self.teacher, trainer, pl_module, self.at), trainer)
        root = student_root(pl_module, self.at)
        self._pairs = {pattern: self._matched(root, pattern) for pattern in self.losses}
        self._heads = None if self.chunked_loss is None else self._found_heads(self.chunked_loss)
        checkpoints: Any = trainer.checkpoint_callback
        folder = str(self.folder or getattr(checkpoints, "dirpath", None) or trainer.default_root_dir)
        if self.teacher == SELF and "://" in folder:
            raise ValueError(
                f"the teacher cannot be written to {folder}: say where, DistillationCallback(folder='/local/folder')"
            )
        self._folder, self._writes = Path(folder), trainer.is_global_zero

    def _matched(self, root: nn.Module, pattern: str) -> list[_Pair]:
        assert self._teacher is not None
        given, pairs = self.pairs.get(pattern), []
        for site in sites(root, pattern):
            wanted = given or (site.name if site.key is None else f"{site.name}:{site.key}")
            try:
                pairs.append(_Pair(site, partner(self._teacher.module, wanted, site.stars if given else ())))
            except ValueError as error:
                raise ValueError(
                    f"teacher of {site.name}: {error}; write pairs={{{pattern!r}: 'name of the teacher'}}"
                ) from None
        return pairs

    def _found_heads(self, tokens: int) -> HeadPair:
        """The heads of the one loss on logits of a language model, whose sites need no tap then."""
        for pattern, loss in self.losses.items():
            (pair, *more) = self._pairs[pattern]
            if isinstance(loss, OnLogits) and not more and (heads := heads_of(pair.student, pair.teacher)):
                self._pairs[pattern] = []
                return HeadPair(pattern, loss, *heads, tokens=tokens)
        raise ValueError(
            f"chunked_loss={tokens} is for a loss on the logits of a causal language model of transformers, "
            "DistillationCallback(losses={'forward': KL()}, ...), and there is none here: leave chunked_loss out"
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """By now a checkpoint that the run resumes from has been read, under every strategy."""
        assert self._teacher is not None
        resumed, self._resumed = self._resumed, None
        if resumed is None:
            if self.teacher == SELF and trainer.ckpt_path is not None:
                raise ValueError(
                    f"{trainer.ckpt_path} knows no teacher named {self.name!r}: a run that is taught by itself begins "
                    "with fit(...) without ckpt_path; or say what teaches it, DistillationCallback('float.ckpt', ...)"
                )
            return
        if self.teacher == SELF:
            self._teacher.load(_stored(resumed, trainer))
        if self._teacher.digest != resumed["digest"]:
            raise ValueError(
                f"the teacher {self.name!r} is not the one this run began with: resume with that one, or start a new "
                "run from the weights of the checkpoint, without ckpt_path"
            )

    def state_dict(self) -> dict[str, Any]:
        """Which teacher it is, never its weights."""
        if self._teacher is None or not self._writes:
            return {}
        file = str(self._teacher.save(self._folder)) if self.teacher == SELF else None
        return {"digest": self._teacher.digest, "file": file}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = dict(state_dict)

    def release(self) -> None:
        self._pairs, self._heads = {}, None

    # --- the loss ---

    @contextmanager
    def watch(
        self, trainer: Trainer, pl_module: LightningModule, arguments: tuple[Any, ...], options: Mapping[str, Any]
    ) -> Iterator[Callable[[], Tensor]]:
        assert self._teacher is not None
        teacher = self._teacher
        pairs = [pair for matched in self._pairs.values() for pair in matched]
        batch = arguments[0] if arguments else next(iter(options.values()), None)
        told = Taps(pair.teacher for pair in pairs)
        with Taps(pair.student for pair in pairs) as said, told, self._heads or nullcontext():
            if self.at is None:
                with teacher.running(), suppress(Reached):
                    teacher.module.training_step(*_apart(arguments), **_apart(options))  # type: ignore[operator]
                yield lambda: self._loss(said, told, batch)
            else:
                with _beside(student_root(pl_module, self.at), teacher):
                    yield lambda: self._loss(said, told, batch)

    def _loss(self, said: Taps, told: Taps, batch: Any) -> Tensor:
        mask = None if self.mask is None else _entry(batch, self.mask)
        total: Tensor | None = None
        for pattern, loss in self.losses.items():
            losses = [value for pair in self._pairs[pattern] for value in _compared(pair, loss, said, told, mask)]
            if self._heads is not None and self._heads.pattern == pattern:
                losses = self._heads.losses(mask)
            value = sum(losses[1:], losses[0]) * (self.weights[pattern] / len(losses))
            total = value if total is None else total + value
        assert total is not None
        return total


def _entry(batch: Any, key: str) -> Tensor:
    if not isinstance(batch, Mapping) or key not in batch:
        there = f"has {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else f"is a {type(batch).__name__}"
        raise ValueError(f"mask={key!r} is no entry of the batch; it {there}")
    tensor: Tensor = batch[key]
    return tensor


def _compared(pair: _Pair, loss: Comparison, said: Taps, told: Taps, mask: Tensor | None) -> list[Tensor]:
    """The losses of one pair, call by call."""
    names = f"student {pair.student.name}, teacher {pair.teacher.name}"
    try:
        mine, theirs = said.outputs(pair.student, trained=True), told.outputs(pair.teacher)
        if len(mine) != len(theirs):
            raise ValueError(f"called {len(mine)} times in the student's step and {len(theirs)} times in the teacher's")
        return [loss(s, t, mask) for s, t in zip(mine, theirs, strict=True)]
    except ValueError as error:
        raise ValueError(f"{names}: {error}") from None


@contextmanager
def _beside(student: nn.Module, teacher: Teacher) -> Iterator[None]:
    """Let the teacher answer whatever the student is asked, before the student does."""

    def ask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with teacher.running(), suppress(Reached):
            teacher.module(*args, **kwargs)

    handle = student.register_forward_pre_hook(ask, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _apart(values: Any) -> Any:
    """Arguments whose lists and dicts are the teacher's own, so that a step that empties its batch harms nobody."""
    if isinstance(values, Mapping):
        return dict(zip(values, _apart(tuple(values.values())), strict=True))
    return tuple(copy.copy(value) if isinstance(value, MutableMapping | list) else value for value in values)


def _stored(resumed: Mapping[str, Any], trainer: Trainer) -> Path:
    """Where the teacher lies now: where it was written, or beside the checkpoint, if both were moved."""
    written = Path(resumed["file"])
    moved = Path(str(trainer.ckpt_path)).parent / written.name
    for path in (written, moved):
        if path.is_file():
            return path
    raise ValueError(
        f"the teacher of this run is gone: neither {written} nor {moved} exists. Put the file back, or start a new run "
        "from the weights of the checkpoint, without ckpt_path"
    )
