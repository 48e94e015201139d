"""Capture: what flows into the blocks of a model, one block at a time.

A model is seen as blocks, each called once in a forward pass. To learn what enters a block, the model runs on a batch
with every earlier block answered from memory, until the block is called: its arguments are kept and a private exception
ends the run. So whatever a model computes before and between its blocks (embeddings, masks, skip connections, reshapes)
is computed by the model itself, and no architecture has to be described.
"""

import inspect
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from qlightning.layers.coverage import public_name
from qlightning.layers.layer import Twin

Forward = Callable[[Any, Any], Any]
"""Runs a module on a batch: (module, batch) -> anything."""

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and named arguments of one call."""


class Site(NamedTuple):
    """One quantized weight where it sits.

    Attributes:
        name: What a user calls it.
        layer: The converted layer.
        prefix: The weight's name in it, and of its quantizer.
    """

    name: str
    layer: Twin
    prefix: str

    @property
    def quantizer(self) -> Any:
        quantizer = self.layer.quantizer(self.prefix)
        assert quantizer is not None
        return quantizer

    @property
    def weight(self) -> Tensor:
        """The weight as the matrix (output channels, fan-in), outside autograd."""
        return self.layer.weights()[self.prefix].detach()


def sites_of(module: nn.Module, name: str = "") -> list[Site]:
    """Every quantized weight in a module, in the order of definition; a weight that two layers share, once."""
    found: dict[int, Site] = {}
    for child, layer in module.named_modules(prefix=name):
        if isinstance(layer, Twin):
            for prefix in layer.weights():
                if (quantizer := layer.quantizer(prefix)) is not None:
                    own = public_name(child) if prefix == "weight" else f"{public_name(child)}.{prefix}"
                    found.setdefault(id(quantizer), Site(own, layer, prefix))
    return list(found.values())


# --- blocks ---


def find_blocks(module: nn.Module, names: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """The blocks of a converted module by dotted name.

    Without `names`: the members of every outermost list or sequence that hold quantized weights (decoder layers,
    encoder layers, the stages of a UNet), and each quantized layer outside of such a list for itself. So every
    quantized weight lies in one block.

    Args:
        module: The module.
        names: Globs of the blocks' names, outside of which nothing is calibrated. Of modules inside one another that
            match, the outermost is the block.

    Raises:
        ValueError: There is nothing quantized; a name matches nothing.
    """
    if not sites_of(module):
        raise ValueError(
            f"{type(module).__name__} has no quantized weights to calibrate: convert it first, "
            "qlightning.convert(module, 'int4-g128')"
        )
    if names is None:
        return dict(_outermost("", module, set()))
    public = {name: public_name(name) for name, _ in module.named_modules()}
    for pattern in names:
        if not any(fnmatchcase(own, pattern) for own in public.values()):
            raise ValueError(f"blocks={list(names)!r}: {pattern!r} matches no module, see module.named_modules()")
    blocks = {n: m for n, m in module.named_modules() if any(fnmatchcase(public[n], pattern) for pattern in names)}
    inner = {name for name in blocks for other in blocks if name.startswith(f"{other}.")}
    return {name: block for name, block in blocks.items() if name not in inner and sites_of(block)}


def _outermost(name: str, module: nn.Module, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    if id(module) in seen or not sites_of(module):
        return
    seen.add(id(module))
    if isinstance(module, Twin) or hasattr(module, "base_layer"):  # PEFT's layers go together with what they wrap
        yield name, module
        return
    sequence = isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential)
    for child_name, child in module.named_children():
        full = f"{name}.{child_name}".lstrip(".")
        if not sequence or isinstance(child, nn.ModuleList | nn.ModuleDict):  # which nobody calls
            yield from _outermost(full, child, seen)
        elif id(child) not in seen and sites_of(child):
            seen.add(id(child))
            yield full, child


def run_step(module: nn.Module, batch: Any) -> Any:
    """How a module runs on a batch when nobody says otherwise.

    A LightningModule runs its `training_step`: what it trains on, with whatever noise it draws. Any other module is
    called with the batch: a mapping by name, a tuple or list by position.
    """
    if callable(step := getattr(module, "training_step", None)):
        return step(batch, 0) if len(inspect.signature(step).parameters) > 1 else step(batch)
    if isinstance(batch, Mapping):
        return module(**batch)
    return module(*batch) if isinstance(batch, tuple | list) else module(batch)


class _StopForward(BaseException):
    """Ends a forward pass; no `except Exception` of a model may hold it up."""


def call_until_stopped(call: Callable[[], Any]) -> bool:
    """Run a forward pass; whether `stop_forward` ended it."""
    try:
        call()
    except _StopForward:
        return True
    return False


def stop_forward(*args: Any) -> None:
    """A hook that ends the forward pass."""
    raise _StopForward


class Flow(NamedTuple):
    """The order in which blocks run, and for each how long its output is needed.

    Attributes:
        order: Names of the blocks.
        last_use: By block, the place in `order` of the last block that may read its output.
    """

    order: list[str]
    last_use: dict[str, int]


def trace(call: Callable[[], Any], blocks: Mapping[str, nn.Module]) -> Flow:
    """Run the model once, up to the end of its last block, and see what its blocks hand on.

    Outputs enter autograd as they leave a block, and blocks run outside of it: the graph behind a later block's input
    then tells which outputs went into it, whatever was computed in between. A model that calls its blocks outside of
    autograd tells nothing, and all outputs are needed to the end.
    """
    order: list[str] = []
    alive: list[Any] = []  # so that no other tensor gets the id of one seen before
    outputs: dict[int, str] = {}
    modes: list[bool] = []
    last_use: dict[str, int] = {}

    def before(name: str, args: Any, kwargs: Any) -> None:
        order.append(name)
        last_use.setdefault(name, 0)
        for leaf in _tensors((args, kwargs)):
            last_use.update(dict.fromkeys((outputs[i] for i in _origins(leaf) & set(outputs)), len(order) - 1))
        modes.append(torch.is_grad_enabled())
        torch.set_grad_enabled(False)

    def after(name: str, output: Any) -> Any:
        torch.set_grad_enabled(modes[-1])
        if set(order) == set(blocks):
            stop_forward()

        def enter(leaf: Any) -> Any:
            if not (isinstance(leaf, Tensor) and leaf.is_floating_point()):
                return leaf
            source = leaf.detach().requires_grad_()
            alive.append(source)
            outputs[id(source)] = name
            return source.clone()  # which may be changed in place

        return tree_map(enter, output)

    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        for name, block in blocks.items():
            entering = block.register_forward_pre_hook(lambda m, a, k, n=name: before(n, a, k), with_kwargs=True)  # type: ignore[misc]
            leaving = block.register_forward_hook(lambda m, a, out, n=name: after(n, out))  # type: ignore[misc]
            stack.callback(entering.remove)
            stack.callback(leaving.remove)
        call_until_stopped(call)
    _check_order(order, blocks)
    return Flow(order, last_use if all(modes) else dict.fromkeys(order, len(order)))


def _origins(tensor: Tensor) -> set[int]:
    """Ids of the leaves of autograd that went into a tensor."""
    found: set[int] = set()
    seen: set[Any] = set()
    pending: list[Any] = [tensor.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        pending += [following for following, _ in node.next_functions]
    return found | {id(tensor)}


def _check_order(order: list[str], blocks: Mapping[str, nn.Module]) -> None:
    if missing := [name for name in blocks if name not in order]:
        raise ValueError(
            f"{', '.join(missing[:4])} did not run: pass forward=lambda module, batch: ... that runs them, or name the "
            "blocks that do, calibrate(..., blocks=['model.layers.*'])"
        )
    if twice := [name for name in blocks if order.count(name) > 1]:
        _called_twice(twice[0])


def _called_twice(name: str) -> None:
    raise ValueError(
        f"block {name!r} runs more than once in a forward pass: name larger blocks, calibrate(..., blocks=[...]), or "
        "pass forward=lambda module, batch: ... that runs the model once"
    )


class Stream:
    """One run of the model over all batches, block by block: what each block got and what it returned.

    Tensors are kept on the CPU, those that are one object once, and only while a later block may read them.

    Args:
        module: The model.
        blocks: Its blocks by name.
        flow: Their order.
        batches: The data.
        forward: How the model runs on a batch.
        seed: Batch i draws its random numbers from `seed + i`, whenever it runs.
        numbers: Which i the batches have; 0, 1, ... when not given.
    """

    def __init__(
        self,
        module: nn.Module,
        blocks: Mapping[str, nn.Module],
        flow: Flow,
        *,
        batches: Sequence[Any],
        forward: Forward,
        seed: int = 0,
        numbers: Sequence[int] | None = None,
    ) -> None:
        self.module, self.blocks, self.flow = module, blocks, flow
        self.batches, self.forward, self.seed = batches, forward, seed
        self.numbers = range(len(batches)) if numbers is None else numbers
        self.returned: list[dict[str, Any]] = [{} for _ in batches]

    def inputs(self, name: str) -> list[Call]:
        """The arguments of one block for every batch; all blocks before it must have been kept."""
        calls: list[Call] = []
        for index in range(len(self.batches)):
            calls.append(stored(self._capture(name, index), calls[-1] if calls else None))
        return calls

    def _capture(self, name: str, index: int) -> Call:
        found, number = list[Call](), self.numbers[index]

        def before(block: nn.Module, args: Any, kwargs: Any) -> None:
            found.append((args, kwargs))
            stop_forward()

        with ExitStack() as stack:
            for answered, output in self.returned[index].items():
                stack.enter_context(_answering(self.blocks[answered], answered, output))
            stack.callback(self.blocks[name].register_forward_pre_hook(before, with_kwargs=True).remove)
            batch, seed = self.batches[index], self.seed + number
            stopped = call_until_stopped(lambda: run_batch(self.module, batch, self.forward, seed))
        if not stopped:
            raise ValueError(f"batch {number} does not run block {name!r}, as the first batch did")
        for leaf in tree_leaves(found[0]):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and bool(leaf.isnan().any()):
                raise ValueError(
                    f"block {name!r} is given NaN: either the model computes NaN on batch {number}, or it reads the "
                    "output of an earlier block outside of autograd; name larger blocks, calibrate(..., blocks=[...])"
                )
            if type(leaf).__name__.endswith("Cache"):
                raise ValueError(
                    f"block {name!r} is given a {type(leaf).__name__}, which would remember the calibration: pass "
                    "forward=lambda module, batch: module(batch['input_ids'], use_cache=False)"
                )
        return found[0]

    def keep(self, name: str, index: int, output: Any) -> None:
        """Let later runs of batch `index` find the output of a block."""
        self.returned[index][name] = stored(output)

    def forget(self, place: int) -> None:
        """Free what no block from `place` in the order on reads."""
        for returned in self.returned:
            for name, output in returned.items():
                if self.flow.last_use[name] < place:
                    returned[name] = tree_map(_gone, output)


def run_batch(module: nn.Module, batch: Any, forward: Forward, seed: int) -> Any:
    """One forward pass, its random numbers a function of `seed`."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    return forward(module, fetched(batch, device_of(module)))


class _Gone:
    """A tensor whose values nobody reads any more."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.dtype = tensor.shape, tensor.dtype


def _gone(leaf: Any) -> Any:
    return _Gone(leaf) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


@contextmanager
def _answering(block: nn.Module, name: str, output: Any) -> Iterator[None]:
    """The block returns what it returned before, once, without running."""
    own, calls = vars(block).get("forward"), 0

    def answer(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 1:
            _called_twice(name)
        return fetched(output, device_of(block))

    block.forward = answer
    try:
        yield
    finally:
        del block.forward
        if own is not None:
            block.forward = own


def device_of(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def stored(tree: Any, before: Any = None) -> Any:
    """Copies on the CPU. What equals the leaf at the same place of `before` (masks, rotary tables) is that leaf."""
    copies: dict[int, Tensor] = {}
    known = iter(tree_leaves(before) if before is not None else ())

    def store(leaf: Any) -> Any:
        earlier = next(known, None)
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in copies:
            copy = leaf.detach().to("cpu", copy=True)
            same = isinstance(earlier, Tensor) and earlier.dtype == copy.dtype and torch.equal(earlier, copy)
            copies[id(leaf)] = earlier if same else copy  # type: ignore[assignment]
        return copies[id(leaf)]

    return tree_map(store, tree)


def fetched(tree: Any, device: torch.device) -> Any:
    """Copies on the device, which may be changed in place; what was one tensor is one again."""
    copies: dict[int, Tensor] = {}

    def fetch(leaf: Any) -> Any:
        if isinstance(leaf, _Gone):  # NaN, so that a value read against what was traced is seen
            return torch.full(leaf.shape, float("nan"), dtype=leaf.dtype, device=device)
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in copies:
            copies[id(leaf)] = leaf.to(device, copy=True)
        return copies[id(leaf)]

    return tree_map(fetch, tree)
