"""Two heads of language models, a student's and a teacher's, whose logits are compared without being stored."""

from contextlib import ExitStack

from torch import Tensor

from qlightning.losses.head import Headed, Hidden, check_alone, headed
from qlightning.losses.soft import OnLogits
from qlightning.losses.taps import Site
from qlightning.losses.through_head import compare_through_heads


def heads_of(student: Site, teacher: Site) -> tuple[Headed, Headed] | None:
    """The language models that two sites are or hold, or None where not both are, or hold, exactly one.

    Raises:
        ValueError: The teacher's logits are not its head's alone, or a head is sharded.
    """
    mine, theirs = headed(student.module), headed(teacher.module)
    if mine is None or theirs is None:
        return None
    for known in (mine, theirs):
        if any(hasattr(parameter, "placements") for parameter in known.head.parameters()):
            raise ValueError(
                f"the head of {type(known.model).__name__} is sharded, and cannot be asked outside of the model: leave "
                "chunked_loss out of DistillationCallback, or train without a sharding strategy, strategy='ddp'"
            )
    check_alone(theirs)
    return mine, theirs


class HeadPair:
    """Keeps what goes into both heads during a step; afterwards the loss of what comes out of them.

    Args:
        pattern: The user's name for what is compared.
        loss: What compares logits.
        student: The student's model.
        teacher: The teacher's, whose call ends with `Reached` once its head is reached.
        tokens: How many tokens' logits are in memory at once.
    """

    def __init__(self, pattern: str, loss: OnLogits, student: Headed, teacher: Headed, *, tokens: int) -> None:
        self.pattern, self.loss, self.tokens = pattern, loss, tokens
        self._said, self._told = Hidden(student), Hidden(teacher, ends=True)
        self._entered = ExitStack()

    def __enter__(self) -> "HeadPair":
        for hidden in (self._said, self._told):
            self._entered.enter_context(hidden)
        return self

    def __exit__(self, *error: object) -> None:
        self._entered.close()

    def losses(self, mask: Tensor | None) -> list[Tensor]:
        """The loss of each call of the heads; what was kept is let go of."""
        mine, theirs = self._said.states, self._told.states
        self._said.states, self._told.states = [], []
        names = f"{self.pattern!r} with chunked_loss={self.tokens}"
        if not mine or len(mine) != len(theirs):
            raise ValueError(
                f"{names}: the head was called {len(mine)} times in the student's step and {len(theirs)} times in the "
                "teacher's, whose step ends with the first: leave chunked_loss out"
            )
        heads = {"head": self._said.known.head, "teacher_head": self._told.known.head}
        try:
            return [
                compare_through_heads(self.loss, s, t, **heads, mask=mask, tokens=self.tokens)
                for s, t in zip(mine, theirs, strict=True)
            ]
        except ValueError as error:
            raise ValueError(f"{names}: {error}") from None
