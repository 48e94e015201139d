"""Several transforms in a row."""

from collections.abc import Sequence

from torch import Tensor, nn

from qlightning.numerics.transform import Transform


class Chain(Transform):
    """One transform after the other, `Chain([RMSNorm(), Hadamard()])`.

    Args:
        parts: The transforms in the order in which they act.
    """

    def __init__(self, parts: Sequence[Transform]) -> None:
        super().__init__()
        if not parts:
            raise ValueError("Chain([]) does nothing: leave it out, or write Chain([RMSNorm(), Hadamard()])")
        self._parts = nn.ModuleList(parts)

    @property
    def parts(self) -> list[Transform]:
        return list(self._parts)  # type: ignore[arg-type]

    def build(self, matrix: Tensor, features: int) -> None:
        for part in self.parts:
            part.build(matrix, features)

    def on_attached(self, layer: nn.Module) -> None:
        for part in self.parts:
            part.on_attached(layer)

    def on_detached(self, layer: nn.Module) -> None:
        for part in reversed(self.parts):
            part.on_detached(layer)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x
