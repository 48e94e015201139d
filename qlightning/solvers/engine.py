"""The calibration engine: one pass over the blocks of a converted model, whatever the solver.

    capture -> float pass -> solve -> commit -> propagate -> free

Two streams go through the model block by block: the float model's activations ("fp"), and those of the model as it is
calibrated so far ("q"). Input quantizers are off in both: solvers see the inputs of quantized weights, not of quantized
inputs. Static scales of inputs that nothing has settled yet observe the "q" stream and are settled by it.
"""

import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qlightning.capture import (
    Call,
    Flow,
    Forward,
    Site,
    Stream,
    device_of,
    fetched,
    find_blocks,
    run_batch,
    run_step,
    sites_of,
    trace,
)
from qlightning.layers.layer import Twin
from qlightning.layers.sharding import refuse_flat, resting, whole, whole_when_called
from qlightning.numerics.learned import Static
from qlightning.solvers.commit import commit, rounded
from qlightning.solvers.fixed import fix_scales
from qlightning.solvers.moments import Moments, gather, group_by_input, visible
from qlightning.solvers.quiet import quiet
from qlightning.solvers.report import BlockRow, CalibrationReport, SiteRow
from qlightning.solvers.share import Share, fingerprint, first_batch, share_of
from qlightning.solvers.solver import BlockSolver, BlockTask, SiteSolver, Solver, main_output

Groups = Sequence[Sequence[Site]]


def calibrate(
    module: nn.Module,
    batches: Iterable[Any],
    solver: Solver,
    *,
    blocks: Sequence[str] | None = None,
    forward: Forward = run_step,
    state: Mapping[str, Any] | None = None,
    on_block: Callable[[dict[str, Any]], None] | None = None,
) -> CalibrationReport:
    """Find the quantized weights of a converted module from data, in place.

    Every weight's scale is settled on the float weight first and stays (see `fix_scales`): the solution lies on the
    grid that training and export use, `quantizer(weight)` is the solution bit for bit. Training flags, switches and
    random numbers are afterwards as before. Runs on the device of each part of the module.

    Several processes (`torch.distributed`) call it together, each with batches of its own, or all with the same ones,
    which they then share out. They find what one process would on all of these (up to the order in which sums over
    tokens are added; of scales of inputs that are moving averages, the mean), and all the same, bit for bit. What FSDP2
    has sharded is gathered block by block.

    Args:
        module: Converted by `qlightning.convert`; a LightningModule or any other.
        batches: Calibration data; the first `solver.batches` are used, by all processes together.
        solver: A site solver (`GPTQ()`, ...) or a block solver (`ApiQ()`, ...).
        blocks: Globs of the blocks' names, to which calibration is then confined; found when not given.
        forward: Runs the module on a batch, (module, batch) -> anything. A LightningModule's `training_step` when not
            given; any other module is called with the batch.
        state: What `on_block` was last given in an interrupted run on the same model, data and solver: blocks solved
            there are not solved again.
        on_block: Called after every block with the state so far, tensors on the CPU and plain data, to be saved; in
            every process with the same.

    Raises:
        ValueError: The module is not converted, a block does not run or runs more than once, there is no data, the
            state is of another run, or FSDP1 has wrapped the module.
    """
    refuse_flat(module, repr(solver))
    found = find_blocks(module, blocks)
    data, share = share_of(batches, solver.batches, device_of(module))
    if not share.count(len(data)):
        raise ValueError("there is no calibration data: calibrate(module, batches, solver) takes at least one batch")
    fix_scales(module)
    run = _Run(module, found, data, solver, forward, share)
    if state is not None:
        run.resume(state)
    with quiet(module), resting(module), whole(module, without=found.values()):
        first = first_batch(data, share)
        with whole_when_called(found.values()):
            flow = trace(lambda: run_batch(module, first, forward, solver.seed), found)
        run.start(flow)
        for place, name in enumerate(flow.order):
            with whole(found[name]):
                run.block(name)
                if on_block is not None:
                    run.solved[name] = {k: v.detach().cpu().clone() for k, v in found[name].state_dict().items()}
            run.free(place + 1)
            if on_block is not None:
                on_block(run.state)
    for site in sites_of(module):
        if site.name in run.report.states:  # its values are on no grid of its quantizer's
            site.quantizer.enabled = False
    return run.report


class _Run:
    """One calibration."""

    q: Stream
    fp: Stream

    def __init__(
        self,
        module: nn.Module,
        blocks: Mapping[str, nn.Module],
        data: list[Any],
        solver: Solver,
        forward: Forward,
        share: Share,
    ) -> None:
        self.module, self.blocks, self.data, self.solver, self.forward = module, blocks, data, solver, forward
        self.share, self.all = share, range(share.count(len(data)))
        self.report = CalibrationReport(repr(solver), len(self.all))
        self.solved: dict[str, dict[str, Any]] = {}
        owners = Counter(id(site.quantizer) for name, block in blocks.items() for site in sites_of(block, name))
        self.shared = {quantizer for quantizer, count in owners.items() if count > 1}
        marks = share.over(self.all, lambda i: float(fingerprint(data[i])))
        self.made_by = {"solver": repr(solver), "data": zlib.crc32(repr(marks).encode()), "blocks": list(blocks)}

    @property
    def state(self) -> dict[str, Any]:
        return {"made_by": self.made_by, "solved": dict(self.solved), "report": self.report.state()}

    def resume(self, state: Mapping[str, Any]) -> None:
        for what, mine in self.made_by.items():
            if (theirs := state["made_by"][what]) != mine:
                raise ValueError(f"the state is of another calibration, its {what} are {theirs!r} and not {mine!r}")
        self.solved = dict(state["solved"])
        self.report.load_state(state["report"])

    def start(self, flow: Flow) -> None:
        numbers = [self.share.number(i) for i in range(len(self.data))]
        options: dict[str, Any] = {"forward": self.forward, "seed": self.solver.seed, "numbers": numbers}
        self.q, self.fp = (Stream(self.module, self.blocks, flow, batches=self.data, **options) for _ in range(2))

    def free(self, place: int) -> None:
        self.q.forget(place)
        self.fp.forget(place)

    def block(self, name: str) -> None:
        """Solve one block and move both streams past it."""
        block = self.blocks[name]
        fp, q = (self.share.together(lambda s=s: s.inputs(name)) for s in (self.fp, self.q))  # type: ignore[misc]
        calls = {"fp": fp, "q": q}
        groups = self._groups(name, fp)
        wants_fp = isinstance(self.solver, SiteSolver) and self.solver.stream == "fp" and name not in self.solved
        wanted = self._all_solvable(groups) if wants_fp else []
        moments = gather(wanted, lambda: self._pass(name, fp, self.fp), self.share)
        done = name in self.solved
        if done:
            block.load_state_dict(self.solved[name])
        else:
            self._solve(name, groups, calls, moments)
            self.share.agree([*block.parameters(), *block.buffers()])
        with _observing(block, self.share) as settle:
            error = self._pass(name, q, self.q, against=self.fp)
            settle()
        if not done:
            self.report.blocks.append(BlockRow(name, error))

    def _groups(self, name: str, calls: Sequence[Call]) -> Groups:
        """The block's sites that run on the first batch, those with one input together."""
        block = self.blocks[name]
        sites = {site.name: site for site in sites_of(block, name)}

        def run() -> list[list[str]]:
            groups = group_by_input(list(sites.values()), lambda: _call(block, calls[0]))
            return [[site.name for site in group] for group in groups]

        return [[sites[own] for own in group] for group in self.share.decide(run)]

    def _pass(self, name: str, calls: Sequence[Call], into: Stream, *, against: Stream | None = None) -> float:
        """Run a block on all batches into a stream; the squared distance to another stream, as a share of that."""
        differences, sizes = list[float](), list[float]()
        for i, call in enumerate(calls):
            output = _call(self.blocks[name], call)
            into.keep(name, i, output)
            if against is not None:
                wanted = main_output(against.returned[i][name]).double()
                differences.append(float((main_output(output).cpu().double() - wanted).square().sum()))
                sizes.append(float(wanted.square().sum()))
        if against is None:
            return 0.0
        difference, size = (sum(self.share.over(self.all, found.__getitem__)) for found in (differences, sizes))
        return difference / size if size else 0.0

    def _solve(self, name: str, found: Groups, calls: Mapping[str, list[Call]], moments: dict[str, Moments]) -> None:
        block, solver = self.blocks[name], self.solver
        generator = torch.Generator().manual_seed(zlib.crc32(f"{solver.seed}:{name}".encode()))
        running = {site.name for group in found for site in group}
        for site in sites_of(block, name):
            if id(site.quantizer) in self.shared:
                self._leave(site, "rounded to nearest, and in float until then: two blocks share its weight")
            elif site.name not in running:
                self._leave(site, "rounded to nearest: it did not run on the calibration data")
            elif not self._solvable(site):
                self._leave(site, f"rounded to nearest: {_why_not(site)}")
        groups = self._all_solvable(found)
        if isinstance(solver, BlockSolver):
            self._solve_block(solver, name, groups, calls, generator)
            return
        assert isinstance(solver, SiteSolver)
        for stage in ([group] for group in groups) if solver.refresh == "group" else [groups]:
            if solver.stream == "q":
                moments = gather(stage, lambda: _call_all(block, calls["q"]), self.share)
            for site in (site for group in stage for site in group):
                self._solve_site(solver, site, moments[site.name], generator)

    def _solvable(self, site: Site) -> bool:
        seen = visible(site) or isinstance(self.solver, BlockSolver)
        return seen and "adapter" not in site.layer._modules and id(site.quantizer) not in self.shared

    def _all_solvable(self, groups: Groups) -> Groups:
        kept = [[site for site in group if self._solvable(site)] for group in groups]
        return [group for group in kept if group]

    def _leave(self, site: Site, note: str) -> None:
        weight = site.weight
        site.quantizer.enabled = id(site.quantizer) not in self.shared  # the float stream still has to pass the other
        self.report.sites.append(SiteRow(site.name, (weight.shape[0], weight.shape[1]), note=note))

    def _solve_site(self, solver: SiteSolver, site: Site, moments: Moments, generator: torch.Generator) -> None:
        weight, quantizer = site.weight.clone(), site.quantizer
        quantizer.initialize(weight)
        nearest = rounded(quantizer, weight)
        began = time.perf_counter()
        solution = solver.solve(weight, moments, quantizer=quantizer, generator=generator)
        seconds = time.perf_counter() - began
        commit(site, solution, solver.commit)
        values = solution.values.to(weight.dtype)
        size = moments.loss(weight) or 1.0
        row = SiteRow(site.name, (weight.shape[0], weight.shape[1]), moments.tokens, seconds=seconds)
        row.before, row.after = (moments.loss(v.float() - weight.float()) / size for v in (nearest, values))
        row.changed, row.damping = float((values != nearest).float().mean()), solution.damping
        if not solution.on_grid:
            row.note = "values of its own; its quantizer is off"
            self.report.states[site.name] = {name: tensor.cpu() for name, tensor in solution.state.items()}
        self.report.sites.append(row)

    def _solve_block(
        self,
        solver: BlockSolver,
        name: str,
        groups: Groups,
        calls: Mapping[str, list[Call]],
        generator: torch.Generator,
    ) -> None:
        block, sites = self.blocks[name], [site for group in groups for site in group]
        for site in sites:
            site.quantizer.initialize(site.weight)
        nearest = [rounded(site.quantizer, site.weight) for site in sites]
        began = time.perf_counter()
        targets: dict[str, list[Tensor]] = {}
        if "fp" in solver.targets:
            targets["fp"] = [main_output(returned[name]) for returned in self.fp.returned]
        if "q" in solver.targets:
            targets["q"] = [main_output(_call(block, call)).cpu() for call in calls["q"]]
        with _frozen(block), torch.enable_grad():
            notes = solver.solve(BlockTask(block, groups, calls, targets, self.share), generator=generator) or {}
        seconds = (time.perf_counter() - began) / max(1, len(sites))
        for site, before in zip(sites, nearest, strict=True):
            site.quantizer.enabled = True
            row = SiteRow(site.name, (before.shape[0], before.shape[1]), seconds=seconds)
            row.note = notes.get(site.name, "")
            row.changed = float((rounded(site.quantizer, site.weight) != before).float().mean())
            self.report.sites.append(row)


def _why_not(site: Site) -> str:
    inside = "adapter" in site.layer._modules
    return f"its quantizer sees {'an adapter beside the weight' if inside else 'inputs that only the layer knows'}"


def _call(block: nn.Module, call: Call) -> Any:
    args, kwargs = fetched(call, device_of(block))
    return block(*args, **kwargs)


def _call_all(block: nn.Module, calls: Sequence[Call]) -> None:
    for call in calls:
        _call(block, call)


@contextmanager
def _frozen(block: nn.Module) -> Iterator[None]:
    with ExitStack() as stack:
        for parameter in block.parameters():
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
        yield


@contextmanager
def _observing(block: nn.Module, share: Share) -> Iterator[Callable[[], None]]:
    """Let static scales of activations that have no value yet observe; what is yielded settles them, on what all
    processes saw."""
    waiting = [
        quantizer
        for layer in block.modules()
        if isinstance(layer, Twin)
        for prefix, quantizer in layer.quantizers()
        if prefix not in layer.weights() and isinstance(quantizer.scale, Static) and not quantizer.ready
    ]
    for quantizer in waiting:
        quantizer.observing = True

    def settle() -> None:
        for quantizer in waiting:
            scale = quantizer.scale
            assert isinstance(scale, Static)
            if not share.alone:
                scale.merge(share.sum)
            if bool(scale.count):
                scale.settle()

    try:
        yield settle
    finally:
        for quantizer in waiting:
            quantizer.observing = False
