"""Moments: what a solver knows of the inputs of a weight.

Shapes: g groups of output channels that see different inputs (1 but for grouped convolutions), n tokens, d fan-in.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import singledispatch
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlightning.capture import Site
from qlightning.layers.conv import ConvTransposeTwin, ConvTwin
from qlightning.layers.linear import LinearTwin, TransposedLinearTwin
from qlightning.solvers.share import ALONE, Share


@singledispatch
def fan_in(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer's input as the rows (g, n, d) that its weight's matrix is multiplied with. A new twin registers here.

    Raises:
        ValueError: What the weight is multiplied with cannot be seen from outside the layer.
    """
    raise ValueError("what its weight is multiplied with cannot be seen from outside the layer")


@fan_in.register
def _linear(layer: LinearTwin, x: Tensor) -> Tensor:
    return layer.transformed(x).reshape(1, -1, x.shape[-1])


@fan_in.register
def _transposed_linear(layer: TransposedLinearTwin, x: Tensor) -> Tensor:
    return layer.transformed(x).reshape(1, -1, x.shape[-1])


@fan_in.register
def _conv(layer: ConvTwin, x: Tensor) -> Tensor:
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(_channels_first(layer, x), list(layer._reversed_padding_repeated_twice), mode=mode)
    return _by_group(layer, _patches(x, layer.kernel_size, layer.dilation, layer.stride))


@fan_in.register
def _conv_transpose(layer: ConvTransposeTwin, x: Tensor) -> Tensor:
    """A transposed convolution is a plain one of the input spread out by its stride, with the kernel reversed."""
    x = _channels_first(layer, x)
    spread = x.new_zeros(*x.shape[:2], *((n - 1) * s + 1 for n, s in zip(x.shape[2:], layer.stride, strict=True)))
    places: tuple[Any, ...] = tuple(slice(None, None, s) for s in layer.stride)
    spread[..., *places] = x
    assert not isinstance(layer.padding, str)
    sides: list[int] = []
    for k, d, p, extra in zip(layer.kernel_size, layer.dilation, layer.padding, layer.output_padding, strict=True):
        sides = [d * (k - 1) - p, d * (k - 1) - p + extra, *sides]
    patches = _patches(F.pad(spread, sides), layer.kernel_size, layer.dilation, (1,) * len(layer.stride))
    kernel = patches.unflatten(1, (x.shape[1], -1)).flip(2)
    return _by_group(layer, kernel.flatten(1, 2))


def _channels_first(layer: Any, x: Tensor) -> Tensor:
    """(N, C, *spatial), as the convolution sees it."""
    x = x if x.dim() == len(layer.kernel_size) + 2 else x.unsqueeze(0)
    return layer.transformed(x.movedim(1, -1)).movedim(-1, 1)  # type: ignore[no-any-return]


def _patches(x: Tensor, kernel: Sequence[int], dilation: Sequence[int], stride: Sequence[int]) -> Tensor:
    """(N, C * kernel positions, output positions)."""
    if x.dim() == 3:
        x, kernel, dilation, stride = x.unsqueeze(2), (1, *kernel), (1, *dilation), (1, *stride)
    return F.unfold(x, tuple(kernel), tuple(dilation), 0, tuple(stride))


def _by_group(layer: Any, patches: Tensor) -> Tensor:
    return patches.unflatten(1, (layer.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)


def write(site: Site, matrix: Tensor) -> None:
    """Give a site's weight the values of a matrix (output channels, fan-in), in place."""
    with torch.no_grad():
        getattr(site.layer, site.prefix).copy_(site.layer.laid_out(matrix.contiguous()))


class Moments:
    """Sums over tokens: the Gram matrix G = sum w x x^T, and statistics of every input channel.

    Order and size of batches do not matter. G is summed in float64 (float32 where a device has none); products are
    taken in float64 on a CPU and in float32 elsewhere.

    Args:
        gram: (g, d, d) sum of weighted x x^T.
        total: Sum of the tokens' weights.

    Attributes:
        tokens: Number of tokens, in all groups alike.
        absmax: (g, d) largest magnitude.
        sum: (g, d) weighted sum.
        abs_sum: (g, d) weighted sum of magnitudes.
    """

    def __init__(self, gram: Tensor, total: float = 1.0) -> None:
        self.gram, self.total, self.tokens = gram, total, 0
        self.absmax, self.sum, self.abs_sum = (gram.new_zeros(gram.shape[:2]) for _ in range(3))

    @staticmethod
    def empty(groups: int, features: int, device: torch.device | None = None) -> "Moments":
        """Moments of no tokens yet."""
        wide = torch.float32 if device is not None and device.type == "mps" else torch.float64
        return Moments(torch.zeros(groups, features, features, dtype=wide, device=device), 0.0)

    def update(self, x: Tensor, weight: Tensor | None = None) -> None:
        """Take in rows.

        Args:
            x: (g, n, d).
            weight: (n,) weight of each token; 1 when not given.
        """
        x = x.detach().to(self.gram.dtype if x.device.type == "cpu" else torch.float32)
        weighted = x if weight is None else x * weight.to(x)[:, None]
        self.gram += weighted.transpose(1, 2) @ x
        self.total += x.shape[1] if weight is None else float(weight.sum())
        self.tokens += x.shape[1]
        if x.shape[1]:
            self.absmax = torch.maximum(self.absmax, x.abs().amax(1).to(self.gram))
        self.sum += weighted.sum(1)
        self.abs_sum += weighted.abs().sum(1)

    def merge(self, share: Share) -> None:
        """Take in what all other processes have seen."""
        self.gram = share.sum(self.gram).to(self.gram)
        self.absmax = share.largest(self.absmax).to(self.gram)
        self.sum, self.abs_sum = (share.sum(tensor).to(self.gram) for tensor in (self.sum, self.abs_sum))
        total, tokens = share.sum(torch.tensor([self.total, self.tokens], dtype=torch.float64)).tolist()
        self.total, self.tokens = total, round(tokens)

    @property
    def hessian(self) -> Tensor:
        """(g, d, d) mean of x x^T; no factor 2."""
        return self.gram / max(self.total, torch.finfo(torch.float32).tiny)

    def loss(self, error: Tensor) -> float:
        """Mean squared change of the outputs, tr(E H E^T) in sum over output channels, for E (output channels, d)."""
        by_group = error.to(self.gram).unflatten(0, (self.gram.shape[0], -1))
        return float(((by_group @ self.hessian) * by_group).sum())


@contextmanager
def watching(sites: Iterable[Site], see: Callable[[Site, Tensor], None]) -> Iterator[None]:
    """Let `see` have the input of every site whenever its layer runs."""
    with ExitStack() as stack:
        for site in sites:

            def before(layer: Any, args: Any, kwargs: Any, site: Site = site) -> None:
                see(site, next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)))

            stack.callback(site.layer.register_forward_pre_hook(before, with_kwargs=True).remove)
        yield


def group_by_input(sites: Sequence[Site], call: Callable[[], Any]) -> list[list[Site]]:
    """The sites that run in `call`, in the order in which they run; those with one and the same input together."""
    groups: dict[tuple[int, int], list[Site]] = {}
    alive: list[Tensor] = []  # so that no other input gets the id of an earlier one

    def see(site: Site, x: Tensor) -> None:
        alive.append(x)
        groups.setdefault((id(x), x._version), []).append(site)

    with watching(sites, see):
        call()
    once: dict[int, Site] = {}
    for site in (site for group in groups.values() for site in group):
        once.setdefault(id(site.quantizer), site)  # one that runs twice, or a weight that two layers share
    kept = [[site for site in group if once.pop(id(site.quantizer), None)] for group in groups.values()]
    return [group for group in kept if group]


def visible(site: Site) -> bool:
    """Whether what the site's weight is multiplied with can be seen."""
    return fan_in.dispatch(type(site.layer)) is not fan_in.dispatch(object)


def groups_in(site: Site) -> int:
    """How many groups of output channels see different inputs."""
    return int(getattr(site.layer, "groups", 1))


def gather(groups: Iterable[Sequence[Site]], calls: Callable[[], Any], share: Share = ALONE) -> dict[str, Moments]:
    """Moments of the inputs of groups of sites over everything that `calls` runs, by site.

    Linear layers of one group share one object: what they see is the same.

    Args:
        groups: Of sites that can be seen.
        calls: Runs their layers on the data of this process.
        share: With several processes, the moments are those of the data of all.
    """
    followers: dict[str, str] = {}
    for group in groups:
        linear = [site for site in group if _sees_its_input(site)]
        followers |= {site.name: linear[0].name for site in linear[1:]}
    watched = [site for group in groups for site in group if site.name not in followers]

    found = {s.name: Moments.empty(groups_in(s), s.weight.shape[1], s.weight.device) for s in watched}
    with watching(watched, lambda site, x: found[site.name].update(fan_in(site.layer, x))):
        calls()
    for moments in found.values():  # also of what ran in other processes only
        moments.merge(share)
    return found | {name: found[leader] for name, leader in followers.items()}


def _sees_its_input(site: Site) -> bool:
    """Whether the rows are the layer's input as it is."""
    linear = fan_in.dispatch(type(site.layer)) in (_linear, _transposed_linear)
    return linear and "transform" not in site.layer._modules
