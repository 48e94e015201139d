"""AWQ on small models: the float function stays, the search never loses to alpha 0, and it composes with solvers."""

import pytest
import torch

from qlightning.capture import sites_of
from qlightning.layers.convert import convert, quantizers_of
from qlightning.solvers import AWQ, GPTQ, RTN, QuIP, calibrate
from qlightning.solvers.awq import channel_scale


def in_float(model, small):
    """Logits with every quantizer off."""
    switches = [(quantizer, quantizer.enabled) for _, quantizer in quantizers_of(model)]
    for quantizer, _ in switches:
        quantizer.enabled = False
    logits = small.logits(model)
    for quantizer, enabled in switches:
        quantizer.enabled = enabled
    return logits


def outliers(small, spec="int3-g8-asym", **options):
    """A Llama with a few large input channels, as trained ones have."""
    model = small.llama(None, **options)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[3] *= 12
            layer.post_attention_layernorm.weight[[1, 7]] *= 9
            layer.mlp.up_proj.weight[5] *= 10
    if spec is not None:
        convert(model, spec)
    return model


def test_scales_of_channels() -> None:
    a = torch.tensor([0.0, 0.5, 2.0, 32.0])
    assert torch.equal(channel_scale(a, 0.0), torch.ones(4))
    s = channel_scale(a, 0.5)
    expected = torch.tensor([1e-4, 0.5**0.5, 2**0.5, 32**0.5])
    torch.testing.assert_close(s, expected / (expected.max() * expected.min()).sqrt())


def test_the_float_function_stays_and_the_quantized_one_comes_closer(small) -> None:
    plain, model = outliers(small, None), outliers(small)
    wanted = small.logits(plain)
    rounded = outliers(small)
    calibrate(rounded, small.tokens(), RTN())
    report = calibrate(model, small.tokens(), AWQ(shrink=0))
    torch.testing.assert_close(in_float(model, small), wanted, rtol=1e-4, atol=1e-4)
    errors = [float((small.logits(m) - wanted).square().mean()) for m in (model, rounded)]
    assert errors[0] < 0.7 * errors[1]
    rows = {row.name: row for row in report.sites}
    layer = "model.layers.0."
    assert "into input_layernorm" in rows[f"{layer}self_attn.q_proj"].note
    assert "into self_attn.v_proj" in rows[f"{layer}self_attn.o_proj"].note
    assert "into mlp.up_proj" in rows[f"{layer}mlp.down_proj"].note
    # what shares an input shares its scale: columns of q, k, v and the norm moved together
    before, after = (dict(m.named_parameters()) for m in (plain, model))
    s = before[f"{layer}input_layernorm.weight"] / after[f"{layer}input_layernorm.weight"]
    assert not torch.allclose(s, torch.ones_like(s))
    for name in ("q_proj", "k_proj"):
        key = f"{layer}self_attn.{name}.weight"
        torch.testing.assert_close(after[key], before[key] * s)


def test_the_search_never_loses_to_alpha_0_and_says_what_it_found(small) -> None:
    for grid in (1, 10):
        report = calibrate(outliers(small), small.tokens(), AWQ(grid=grid, shrink=0))
        shares = [float(row.note.split(", ")[1].split()[0]) for row in report.sites if row.note.startswith("alpha")]
        assert len(shares) == 14
        assert all(share == 1 for share in shares) if grid == 1 else all(share <= 1 for share in shares)
        assert (min(shares) < 0.8) == (grid == 10)


def test_with_alpha_0_alone_and_no_clipping_it_is_rounding_to_nearest(small) -> None:
    model = small.llama("int3-g8-asym")
    weights = {site.name: site.weight.clone() for site in sites_of(model)}
    values = {site.name: site.quantizer(site.weight).detach() for site in sites_of(model)}
    calibrate(model, small.tokens(), AWQ(grid=1, shrink=0))
    for site in sites_of(model):
        assert torch.equal(site.weight, weights[site.name])
        assert torch.equal(site.quantizer(site.weight).detach(), values[site.name])


def test_clipping_spares_queries_and_keys(small) -> None:
    model = small.llama("int2-g8-asym")
    weights = {site.name: site.weight.clone() for site in sites_of(model)}
    report = calibrate(model, small.tokens(), AWQ(grid=1))
    same = {site.name.rsplit(".", 1)[1] for site in sites_of(model) if torch.equal(site.weight, weights[site.name])}
    assert {row.name.rsplit(".", 1)[1] for row in report.sites if "not clipped" in row.note} == {"q_proj", "k_proj"}
    assert same == {"q_proj", "k_proj"}
    for site in sites_of(model):
        assert bool((site.weight.abs() <= weights[site.name].abs()).all())


def test_scales_are_found_on_the_float_models_activations(small) -> None:
    """So a block's scales are the same whether the blocks before it are quantized or not."""
    alone, whole = outliers(small), outliers(small)
    calibrate(alone, small.tokens(), AWQ(grid=6, shrink=0), blocks=["model.layers.1"])
    calibrate(whole, small.tokens(), AWQ(grid=6, shrink=0))
    found, expected = (m.model.layers[1].input_layernorm.weight for m in (whole, alone))
    assert not torch.allclose(found, outliers(small).model.layers[1].input_layernorm.weight)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_grouped_queries_are_skipped_loudly(small) -> None:
    report = calibrate(outliers(small, num_key_value_heads=1), small.tokens(), AWQ(grid=4, shrink=0))
    notes = {row.name: row.note for row in report.sites}
    assert notes["model.layers.0.self_attn.o_proj"].startswith("not scaled")
    assert "not scaled" in report.table()


@pytest.mark.parametrize("then", [GPTQ(), GPTQ(stream="fp", refresh="block"), RTN(commit="residual")], ids=range(3))
def test_another_solver_rounds_what_was_scaled(small, then) -> None:
    alone, model = outliers(small), outliers(small)
    calibrate(alone, small.tokens(), AWQ(grid=4))
    calibrate(model, small.tokens(), AWQ(grid=4, then=then))
    torch.testing.assert_close(
        model.model.layers[0].input_layernorm.weight, alone.model.layers[0].input_layernorm.weight
    )
    for site in sites_of(model):
        assert site.quantizer.enabled
        stored = site.quantizer.dequantize(site.quantizer.quantize(site.weight), torch.float32)
        assert torch.equal(site.quantizer(site.weight).detach(), stored)
        if then.commit == "values":
            assert torch.equal(stored, site.weight)
    seen = []
    layers = [m.model.layers[0].self_attn.q_proj for m in (alone, model)]
    layers[0].register_forward_pre_hook(lambda layer, args: seen.append(args[0].flatten(0, 1)))
    small.logits(alone)
    scaled, x = layers[0].weight, seen[0]
    nearest, solved = (layer.weight_quantizer(layer.weight) for layer in layers)
    errors = [float((x @ (values - scaled).t()).detach().square().mean()) for values in (nearest, solved)]
    assert errors[1] < 0.9 * errors[0] if isinstance(then, GPTQ) else torch.equal(nearest, solved)


def test_other_kinds_of_models_and_scales(kind) -> None:
    make, batches = kind
    model = make("int3-lsq")
    report = calibrate(model, batches(), AWQ(grid=3))
    assert all(row.note for row in report.sites)
    for site in sites_of(model):
        assert site.quantizer.enabled
        assert bool(site.weight.isfinite().all())


def test_resume(small) -> None:
    whole, states, solver = outliers(small), [], AWQ(grid=4)
    calibrate(whole, small.tokens(), solver, on_block=states.append)
    again = outliers(small)
    calibrate(again, small.tokens(), solver, state=states[0])
    for name, tensor in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"AWQ\(grid=20, shrink=0.5"):
        AWQ(grid=0)
    with pytest.raises(ValueError, match=r"then=GPTQ\(batches=8, seed=0\)"):
        AWQ(batches=8, then=GPTQ())
    with pytest.raises(ValueError, match=r"write AWQ\(then=GPTQ\(\)\)"):
        AWQ(then=QuIP())
