"""BitNet v2: ternary weights whose inputs go down to four bits behind an online Hadamard rotation."""

from collections.abc import Sequence
from typing import Any

from qlightning.callbacks.phase import Phase
from qlightning.layers.scheme import Scheme
from qlightning.methods.bitnet_reloaded import Norm, bit_linear, token_codes
from qlightning.methods.method import Method
from qlightning.numerics import AbsMean, Int, PerToken, Quantizer
from qlightning.numerics.transform import Transform
from qlightning.transforms.chain import Chain
from qlightning.transforms.hadamard import Hadamard


class BitNetV2(Method):
    """Ternary weights (absmean), 8-bit and at the end 4-bit inputs, rotated before o_proj and down_proj.

    Inputs in 8 bits reach 127 at a token's largest magnitude; in 4 bits the step is mean |x| / sqrt(7), so that about
    1.7 % of a Gaussian saturate. Rotated layers compute Q(H norm(x)) W': their weights are trained in the rotated
    basis and nothing is rotated back. Made for training from scratch.

    Paper: BitNet v2: Native 4-bit Activations with Hadamard Transformation for 1-bit LLMs (Wang, Ma and Wei, 2025,
    arXiv 2504.18415).

    Deviations: there is no released code. (secondary) the 4-bit step, the two stages and the rotated layers; (from
    memory) the 8-bit range and the moment of the switch, 95 of 100 billion tokens. The paper's norm stands inside every
    layer; here inside the rotated ones only, since the input of the others comes from the block's own RMSNorm. A width
    that is no power of two is rotated in blocks of the largest one that divides it; the block size is in the
    checkpoint. Keys and values stay in float: compose with Quantization(kv_cache="int4-token") for the paper's option.

    Args:
        input_bits: Bits of layer inputs from the first step on.
        late_bits: Bits of layer inputs after the switch; None for no switch.
        switch: When inputs change to `late_bits`: an optimizer step (int) or a share of the run (float).
        rotated: Names of the layers whose input is rotated, as patterns of rules.
        norm: What stands before the rotation, without parameters: "rms", "layer" or "none".
        block: Size of the Hadamard blocks, a power of two; the largest that divides the width when not given.
    """

    def __init__(
        self,
        *,
        input_bits: int = 8,
        late_bits: int | None = 4,
        switch: int | float = 0.95,
        rotated: Sequence[str] = ("o_proj", "down_proj"),
        norm: Norm = "rms",
        block: int | None = None,
    ) -> None:
        self.input_bits, self.late_bits, self.switch = input_bits, late_bits, switch
        self.rotated = (rotated,) if isinstance(rotated, str) else tuple(rotated)
        self.norm, self.block = norm, block

    def quantization(self) -> dict[str, Any]:
        first = self._rules(_input(self.input_bits))
        if self.late_bits is None:
            return {"rules": first}
        later = _input(self.late_bits)
        switch = Phase(self.switch, rules={pattern: Scheme(input=later) for pattern in first})
        return {"rules": first, "schedule": [Phase(0, quantize="all"), switch]}

    def _rules(self, input: Quantizer) -> dict[str, Scheme]:
        plain = bit_linear("mean", norm="none", input_bits=None)
        own_norm = bit_linear("mean", norm=self.norm).transform
        rotation = Hadamard(self.block)
        transform: Transform = rotation if own_norm is None else Chain([own_norm, rotation])
        rotated = Scheme(plain.weight, input=input, transform=transform)
        return {"*": Scheme(plain.weight, input=input), **dict.fromkeys(self.rotated, rotated)}


def _input(bits: int) -> Quantizer:
    if bits >= 8:
        return token_codes(bits, 127)
    return Quantizer(Int(bits), PerToken(), scale=AbsMean(multiplier=(2 ** (bits - 1) - 1) ** -0.5))
