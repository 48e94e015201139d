"""Conversion: rules -> swap -> coverage, and back.

Only classes and submodules change. Every Parameter object, its name and whatever refers to it stay as they are, so
optimizers, checkpoints, tied weights and adapters keep working; the state dict only gains keys under
`<layer>.<placement>_quantizer.`.
"""

from collections.abc import Iterator, Mapping
from typing import Literal

from torch import nn
from torch.nn.parameter import UninitializedParameter

from qlightning.adapters.adapter import Adapter
from qlightning.adapters.from_peft import wrapped_by_peft
from qlightning.layers import (  # noqa: F401  (so twins are found)
    attention,
    conv,
    embedding,
    experts,
    linear,
    multihead,
    peft,
    query_key,
    timestep,
)
from qlightning.layers.coverage import Coverage, Row, kind_of, public_name
from qlightning.layers.layer import Twin, replaced_forward, restore_layer, twin_for
from qlightning.layers.rules import EVERYTHING, Rules, RuleValue
from qlightning.layers.scheme import Scheme, Spec
from qlightning.layers.swap import Swap
from qlightning.numerics.compiled import divide_exactly
from qlightning.numerics.layer_part import LayerPart
from qlightning.numerics.spec import unparse
from qlightning.numerics.tensor_quantizer import TensorQuantizer

Tied = Literal["float", "share"]


def convert(
    module: nn.Module,
    rules: Rules | Scheme | Spec | Mapping[str, RuleValue],
    *,
    tied: Tied = "float",
    min_coverage: float = 0.5,
) -> Coverage:
    """Give every layer that the rules name its quantizers, in place.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    >>> convert(model, {"*": "int4-g32", "2": None}).weight_share.__round__(2)
    0.89

    Args:
        module: Any module; layers that are converted already must have been converted by the same rules.
        rules: A spec for all weights ("int4-g128"), a Scheme, or schemes by pattern (see `Rules`).
        tied: A weight that two layers share stays in "float", or both get one quantizer to "share".
        min_coverage: Smallest share of the weights nobody chose to leave in float that must be converted, 0 to 1.

    Returns:
        What was converted, what was not and why.

    Raises:
        ValueError: A rule that matches nothing or cannot act, a granularity that does not fit, too little coverage.
    """
    if tied not in ("float", "share"):
        raise ValueError(f"tied={tied!r}: write tied='float' or tied='share'")
    if not 0 <= min_coverage <= 1:
        raise ValueError(f"min_coverage={min_coverage}: a share from 0 to 1, for example min_coverage=0.5")
    rules = Rules(rules)
    with Swap() as swap:
        coverage = _convert(module, rules, swap, tied)
        unconverted = {row.name: row.reason for row in coverage.rows if not row.rule}
        rules.check_used({row.name: row.kind for row in coverage.rows}, unconverted)
        _check_shared(module, _owners(module), tied)
        _check_coverage(coverage, min_coverage if _asks_of_layers(rules) else 0.0)
        _check_placements(coverage, rules)
        _check_adapters(coverage, rules)
    return coverage


def convert_present(module: nn.Module, rules: Rules, *, tied: Tied = "float") -> Coverage:
    """As `convert`, for a module that is not complete yet: a rule may still match nothing, and coverage may be low.

    Rules that name the first or last blocks wait for the whole module, and with them all conversion.
    """
    if rules.positional:
        return Coverage([])
    with Swap() as swap:
        return _convert(module, rules, swap, tied)


def _convert(module: nn.Module, rules: Rules, swap: Swap, tied: Tied) -> Coverage:
    divide_exactly()
    owners, wrappers = _owners(module), wrapped_by_peft(module)
    rules.know(names_of_layers(module))
    rows: list[Row] = []
    errors: list[tuple[str, str]] = []
    counted: set[int] = set()
    for name, layer, adapter in layers_of(module):
        twin, own = twin_for(layer), own_parameters(layer)
        if not own and (twin is None or not twin.placements):
            continue
        weights = sum(p.numel() for p in own if id(p) not in counted)
        counted |= {id(p) for p in own}
        others = {public_name(other) for p in own for other in owners.get(id(p), ())} - {public_name(name)}
        row = Row(public_name(name), kind_of(layer), weights, tied_to=tuple(sorted(others)))
        rows.append(row)
        try:
            if adapter or twin is None:
                row.reason, row.chosen = ("adapter", True) if adapter else _without_twin(row, layer, rules)
            else:
                _apply_rule(row, layer, twin, rules, swap, tied, wrappers)
        except ValueError as error:
            errors.append((row.name, f"{row.name} ({row.kind}): {error}"))
    _raise_all(errors)
    swap.convert_around(module)
    unfreeze_scales(module)
    return Coverage(rows)


def _apply_rule(
    row: Row,
    layer: nn.Module,
    twin: type[Twin],
    rules: Rules,
    swap: Swap,
    tied: Tied,
    wrappers: Mapping[int, nn.Module],
) -> None:
    row.rule, scheme = rules.decide(row.name, row.kind)
    placements = dict(scheme.items()) if scheme is not None else {}
    wanted = {placement: quantizer for placement, quantizer in placements.items() if placement in twin.placements}
    default = rules.by_default(row.rule)
    if default and not twin.by_default:
        row.reason = f"not asked for (a rule such as 'type:{row.kind}' converts it)"
    elif scheme is None:
        row.reason = "output head, in float by default" if default else f"rule {row.rule!r}"
    elif not wanted and "weight" not in twin.placements and row.weights:
        row.reason, row.chosen = _without_twin(row, layer, rules)
    elif not wanted:
        row.reason = f"the rule says nothing of its {', '.join(twin.placements)}"
    elif refusal := None if isinstance(layer, Twin) else twin.refuses(layer):
        row.reason, row.chosen = refusal, False
    elif row.tied_to and tied == "float" and "weight" in wanted:
        row.reason = "its weight is tied to another layer's; tied='share' quantizes both alike"
    if row.reason and wanted and not default:
        raise ValueError(row.reason)
    if not row.reason:
        parts = _parts(scheme, layer, twin, row, wrappers) if scheme else []
        asked = swap.convert(layer, twin, wanted, name=row.name, parts=parts)
        row.placements = tuple(wanted)
        row.parts = {at: shown for part in parts for at, shown in part.shown().items()}
        row.quantizers = {prefix: unparse(quantizer) or repr(quantizer) for prefix, quantizer in asked.items()}
    elif isinstance(layer, Twin) and any(layer.quantizers()):
        raise ValueError(
            f"it is converted already and would stay so, against these rules ({row.reason}); call "
            "qlightning.restore(module) before other rules"
        )


def _parts(
    scheme: Scheme, layer: nn.Module, twin: type[Twin], row: Row, wrappers: Mapping[int, nn.Module]
) -> list[LayerPart]:
    """What a layer gets beside quantizers."""
    parts: list[LayerPart] = []
    for part in scheme.parts():
        if part.beside not in twin.placements:
            continue
        if isinstance(part, Adapter):
            adapter = part.under(wrappers.get(id(layer)), peft=bool(wrappers))
            if adapter is not None and row.tied_to:
                raise ValueError("its weight is tied to another layer's: with an adapter it would be two weights")
            parts += [] if adapter is None else [adapter]
        else:
            parts.append(part)
    return parts


def unfreeze_scales(module: nn.Module) -> None:
    """Let gradient descent move every learned scale again: a PEFT wrapper freezes all parameters it does not know."""
    for _, quantizer in quantizers_of(module):
        for scale in quantizer.learned():
            scale.requires_grad_(True)


def restore(module: nn.Module) -> nn.Module:
    """Turn every converted layer back into the plain layer it was, with its parameters as they are now."""
    for layer in list(module.modules()):
        if isinstance(layer, Twin):
            restore_layer(layer)
    return module


def quantizers_of(module: nn.Module) -> Iterator[tuple[str, TensorQuantizer]]:
    """(dotted name, quantizer) of every quantizer in a module, shared ones once."""
    inside: set[int] = set()  # the stages of a composite, which are no quantizers of their own
    for name, child in module.named_modules():
        if isinstance(child, TensorQuantizer) and id(child) not in inside:
            inside |= {id(stage) for stage in child.modules()}
            yield name, child


def layers_of(module: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """(dotted name, layer, whether it belongs to a PEFT adapter) of every module, without parts of layers."""
    seen: set[int] = set()
    pending = [("", module, False)]
    while pending:
        name, layer, adapter = pending.pop()
        if id(layer) in seen or isinstance(layer, TensorQuantizer | LayerPart):
            continue
        seen.add(id(layer))
        yield name, layer, adapter
        if _is_whole(layer):
            continue
        adapters = getattr(layer, "adapter_layer_names", ())
        children = [
            (f"{name}.{child_name}".lstrip("."), child, adapter or child_name in adapters)
            for child_name, child in layer.named_children()
        ]
        pending += reversed(children)


def names_of_layers(module: nn.Module) -> list[str]:
    """Dotted names, in the model's order, of the layers that "*" decides."""
    twins = ((public_name(name), twin_for(layer)) for name, layer, adapter in layers_of(module) if not adapter)
    return [name for name, twin in twins if twin is not None and twin.by_default and "weight" in twin.placements]


def _owners(module: nn.Module) -> dict[int, list[str]]:
    """Names of the layers that own a weight (not a bias), by its id."""
    owners: dict[int, list[str]] = {}
    for name, layer, _ in layers_of(module):
        for parameter in own_parameters(layer):
            if isinstance(parameter, UninitializedParameter):
                raise ValueError(f"{name!r} has no shape yet: run a batch through its lazy layers before converting")
            if parameter.dim() > 1:
                owners.setdefault(id(parameter), []).append(name)
    return owners


def _is_whole(layer: nn.Module) -> bool:
    twin = twin_for(layer)
    return twin is not None and twin.whole


def own_parameters(layer: nn.Module) -> list[nn.Parameter]:
    """Parameters of a layer and of its parts, without those of quantizers."""
    if not _is_whole(layer):
        return list(layer.parameters(recurse=False))
    learned = {id(p) for _, quantizer in quantizers_of(layer) for p in quantizer.parameters()}
    return [p for p in layer.parameters() if id(p) not in learned]


def _without_twin(row: Row, layer: nn.Module, rules: Rules) -> tuple[str, bool]:
    if (pattern := rules.leaves(row.name, row.kind)) is not None:
        return f"rule {pattern!r}", True
    if replaced_forward(layer):
        return "its forward was replaced on the instance, which goes past its class", False
    if all(p.dim() < 2 for p in layer.parameters(recurse=False)):
        return "no matrix", True
    return f"no quantized twin of {row.kind}", False


def _raise_all(errors: list[tuple[str, str]]) -> None:
    if errors:
        shown = "\n  ".join(text for _, text in errors[:8]) + ("\n  ..." if len(errors) > 8 else "")
        raise ValueError(
            f"{len(errors)} layer(s) cannot be converted as the rules say:\n  {shown}\n"
            f"give them a scheme that fits or leave them in float, for example rules={{{errors[0][0]!r}: None}}"
        )


def _check_shared(module: nn.Module, owners: dict[int, list[str]], tied: Tied) -> None:
    if tied == "float":
        return
    for names in owners.values():
        layers = [module.get_submodule(name) for name in names]
        quantized = [isinstance(layer, Twin) and layer.quantizer("weight") is not None for layer in layers]
        if any(quantized) and not all(quantized):
            missing = next(name for name, done in zip(names, quantized, strict=True) if not done)
            raise ValueError(
                f"tied='share': {' and '.join(names)} share one weight, but no rule gives {missing!r} a scheme; add "
                f"rules={{{public_name(missing)!r}: ...}} with the same weight spec, or write tied='float'"
            )


def _asks_of_layers(rules: Rules) -> bool:
    """Whether any rule asks for more than what attention modules have."""
    return any(
        placement in Twin.placements for scheme in rules.schemes.values() if scheme for placement, _ in scheme.items()
    )


def _check_placements(coverage: Coverage, rules: Rules) -> None:
    """A placement that a rule of the user's names must have been quantized in some layer the rule decides."""
    for pattern in rules.given:
        scheme, decided = rules.schemes[pattern], [row for row in coverage.rows if row.rule == pattern]
        if scheme is None or not decided:
            continue
        placed = {name for row in (coverage.rows if pattern == EVERYTHING else decided) for name in row.placements}
        if missing := [placement for placement, _ in scheme.items() if placement not in placed]:
            refused = sorted({f"{row.kind}: {row.reason}" for row in decided if not row.chosen})
            why = f" ({'; '.join(refused[:3])})" if refused else ""
            raise ValueError(
                f"rule {pattern!r} gives a {' and a '.join(missing)} quantizer, but no layer it decides has that "
                f"placement{why}; leave {', '.join(missing)} out of it"
            )


def _check_adapters(coverage: Coverage, rules: Rules) -> None:
    for pattern, scheme in rules.schemes.items():
        decided = [row for row in coverage.rows if row.rule == pattern and row.weight]
        if scheme is None or scheme.adapter is None or not decided or any("adapter" in row.parts for row in decided):
            continue
        raise ValueError(
            f"rule {pattern!r} puts PEFT's adapters inside quantizers, but PEFT wraps none of the layers it decides "
            f"({', '.join(row.name for row in decided[:3])}): wrap the model before it is converted, "
            "get_peft_model(model, LoraConfig(target_modules='all-linear')), or write Scheme(..., adapter=LoRA(rank=8))"
        )


def _check_coverage(coverage: Coverage, least: float) -> None:
    if coverage.converted and coverage.reachable_share >= least:
        return
    what = "nothing was converted" if not coverage.converted else f"only {coverage.reachable_share:.0%} of the weights"
    raise ValueError(
        f"{what} that nobody chose to leave in float was converted (min_coverage={least:.0%}):\n{coverage.table()}\n"
        "add a rule for what is missing, leave it in float with rules={'<name>': None}, or lower min_coverage"
        if coverage.converted
        else f"{what}:\n{coverage.table()}\nwrite rules that name layers, for example {{'type:Embedding': 'int8'}}"
    )
