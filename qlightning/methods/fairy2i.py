"""Fairy2i: real weights as sums of {1, -1, i, -i} in widely-linear complex form."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qlightning.methods.method import Method
from qlightning.numerics.autograd import Ship
from qlightning.numerics.formats import Ternary
from qlightning.numerics.gradients import STE
from qlightning.numerics.granularity import PerTensor, Shape
from qlightning.numerics.quantizer import Quantized
from qlightning.numerics.rounding import Nearest
from qlightning.numerics.scales import AbsMean
from qlightning.numerics.tensor_quantizer import Gradients, State, TensorQuantizer

# O outputs, I inputs of the real matrix; N = O / 2, M = I / 2. A split weight is (2, 2, N, M): U and V, real and
# imaginary part.


def split(w_OI: Tensor) -> Tensor:
    """W as U and V of y = U x + V conj(x): lossless, (O, I) -> (2, 2, N, M)."""
    (a11, a12), (a21, a22) = (half.chunk(2, dim=1) for half in w_OI.chunk(2, dim=0))
    u, v = torch.stack((a11 + a22, a21 - a12)), torch.stack((a11 - a22, a12 + a21))
    return torch.stack((u, v)) / 2


def join(parts: Tensor) -> Tensor:
    """The inverse of `split`."""
    (u_re, u_im), (v_re, v_im) = parts
    upper = torch.cat((u_re + v_re, v_im - u_im), dim=1)
    return torch.cat((upper, torch.cat((u_im + v_im, u_re - v_re), dim=1)), dim=0)


def phases(parts: Tensor) -> Tensor:
    """The nearest of 1, i, -1, -i by angle: (2, 2, N, M) with one part 0 and the other a sign.

    Sectors are half open: an angle of -pi/4 belongs to 1, of pi/4 to i, and so on around the circle; 0 to 1. Decided by
    comparing magnitudes, since an angle near a sector's edge is lost in half precision.
    """
    real, imaginary = parts.unbind(1)
    on_real = (real.abs() > imaginary.abs()) | ((real.abs() == imaginary.abs()) & (real * imaginary <= 0))
    signs = torch.where(parts < 0, -1.0, 1.0)
    return signs * torch.stack((on_real, ~on_real), dim=1)


class PhaseSum(TensorQuantizer):
    """A sum of `stages` matrices of phases, each of what the ones before left over, with a scale per axis each.

    One bit per real weight and stage, and four scales per stage: the mean magnitude of U's (V's) real (imaginary) parts
    among the entries that became real (imaginary). Gradients pass as through the identity. Where its parts are asked
    for it answers as a ternary quantizer, which a single real or imaginary part is.

    Args:
        stages: Matrices in the sum.
    """

    def __init__(self, *, stages: int = 2) -> None:
        super().__init__()
        if stages < 1:
            raise ValueError(f"PhaseSum(stages={stages}): at least one, for example PhaseSum(stages=2)")
        self.stages = stages
        self.format, self.granularity = Ternary(), PerTensor()
        self.scale, self.gradient, self.rounding = AbsMean(), STE(), Nearest()

    def build(self, shape: Shape) -> None:
        if len(shape) != 2 or any(size % 2 for size in shape):
            raise ValueError(
                f"a weight of shape {tuple(shape)} has no complex form, which takes an even number of outputs and "
                "inputs: leave it in float, rules={'<name>': None}"
            )

    def observe(self, x: Tensor) -> None:
        assert not self.scale.static

    def grid(self, x: Tensor) -> State:
        """Scales, float32 (stages, 2, 2, 1, 1), rounded to the dtype they ship in."""
        dtype = x.dtype if x.dtype in (torch.float16, torch.bfloat16) else torch.float32
        with torch.no_grad():
            rest, scales = split(x.float()), []
            for _ in range(self.stages):
                codes = phases(rest)
                used = codes.abs()
                mean = (rest.abs() * used).sum((2, 3), keepdim=True) / used.sum((2, 3), keepdim=True).clamp(min=1)
                scales.append(Ship.apply(mean.clamp(min=1e-6), dtype))
                rest = rest - codes * scales[-1]
            return (torch.stack(scales),)

    def on_grid(self, x: Tensor, state: State, key: Tensor | None) -> Tensor:
        return join(self._sum(self._codes(x, state[0]), state[0])).to(x.dtype)

    def steps(self, state: State) -> Tensor:
        (scales,) = state
        return scales  # type: ignore[no-any-return]

    def _codes(self, x: Tensor, scales: Tensor) -> list[Tensor]:
        rest, codes = split(x.float()), []
        for scale in scales:
            codes.append(phases(rest))
            rest = rest - codes[-1] * scale
        return codes

    def _sum(self, codes: Sequence[Tensor], scales: Tensor) -> Tensor:
        total = codes[0] * scales[0]
        for code, scale in zip(codes[1:], scales[1:], strict=True):
            total = total + code * scale
        return total

    def grid_gradients(
        self, grad: Tensor, x: Tensor | None, state: State, key: Tensor | None, wanted: Sequence[bool]
    ) -> Gradients:
        return grad, None

    def deploys_like(self, other: TensorQuantizer) -> bool:
        return self == other

    def stored_bytes(self, shape: Shape, dtype: torch.dtype) -> int:
        return self.stages * (-(-torch.Size(shape).numel() // 8) + 4 * dtype.itemsize)

    @torch.no_grad()
    def quantize(self, x: Tensor) -> list[Quantized]:
        """For each stage: phases as codes 0 to 3 (powers of i), uint8 (2, N, M), and scales (2, 2, 1, 1)."""
        (scales,) = self.grid(x)
        stored = []
        for codes, scale in zip(self._codes(x, scales), scales, strict=True):
            real, imaginary = codes.unbind(1)
            power = torch.where(imaginary != 0, 2 - imaginary, 1 - real)
            stored.append(Quantized(power.to(torch.uint8), scale))
        return stored

    def dequantize(self, stored: Sequence[Quantized], dtype: torch.dtype) -> Tensor:
        """The weight in `dtype`, bit for bit that of `forward`."""
        device = stored[0].codes.device
        real, imaginary = (torch.tensor(t, device=device) for t in ([1.0, 0.0, -1.0, 0.0], [0.0, 1.0, 0.0, -1.0]))
        codes = [torch.stack((real[q.codes.long()], imaginary[q.codes.long()]), dim=1) for q in stored]
        return join(self._sum(codes, torch.stack([q.scale for q in stored]))).to(dtype)


class Fairy2i(Method):
    """Two bits per weight without multiplications: a real layer in widely-linear complex form, on {1, -1, i, -i}.

    Paper: Fairy2i (Wang et al., 2025, arXiv 2512.02901).

    Deviations: a layer with an odd number of inputs or outputs is an error, not skipped. The output head stays in float
    (the release says both; name it in rules to quantize it). The paper's two-step learning rate is the task's schedule
    and not set here.

    Args:
        stages: Matrices of phases whose sum a weight is, one bit per real weight each: 1 (W1) or 2 (W2).
        start: When quantization begins, as in QATCallback.
    """

    def __init__(self, stages: int = 2, *, start: int | float = 0) -> None:
        self.stages, self.start = stages, start

    def quantization(self) -> dict[str, Any]:
        return {"weight": PhaseSum(stages=self.stages), "start": self.start}
