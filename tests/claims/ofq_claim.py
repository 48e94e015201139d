"""OFQ piece by piece on a vision transformer at W2A2 (arXiv 2302.02210)."""

import tempfile
from typing import Any

from claim import Arm, Claim, Numbers, mean

from qlightning import Scheme
from qlightning.callbacks.oscillation import OscillationCallback
from qlightning.methods import OFQ, Quantization, compose
from qlightning.numerics import LSQ, Int, Learned, LSQStep, PerChannel, Quantizer

PLAIN: dict[str, Any] = {"scores": "projections", "teacher": None, "boundary": None}


def learned_steps() -> list[Any]:
    """OFQ's inputs with LSQ weights."""
    given = OFQ(**PLAIN).quantization()
    weight = Quantizer(Int(2), PerChannel(), scale=Learned(LSQStep()), gradient=LSQ())
    outer = OFQ().outer
    rules = {
        name: scheme
        if scheme.weight is None or name in outer
        else Scheme(weight, input=scheme.input, output=scheme.output)
        for name, scheme in given["rules"].items()
    }
    return compose(Quantization(**{**given, "rules": rules}))


def watched(make: Any) -> Any:
    return lambda: [*make(), OscillationCallback(folder=tempfile.mkdtemp())]


def flips(module: Any, trainer: Any, data: Any) -> float:
    """Share of the inner layers' codes that change in a step, over the last 50 steps."""
    (watch,) = [callback for callback in trainer.callbacks if isinstance(callback, OscillationCallback)]
    inner = [rows[-1][1] for name, rows in watch.history.items() if ".layers." in name]
    return sum(inner) / len(inner)


def each_step_helps(numbers: Numbers) -> bool:
    lsq, statsq, product, annealed = (mean(numbers[arm]) for arm in ("lsq", "statsq", "product", "product, annealed"))
    return lsq < statsq and max(statsq, product) <= annealed


def calm(numbers: Numbers) -> bool:
    lsq, statsq, annealed = (mean(numbers[arm]) for arm in ("lsq", "statsq", "statsq, annealed"))
    return statsq < lsq and annealed < 0.2 * statsq


ANNEALED: dict[str, Any] = {**PLAIN, "boundary": 0.005, "anneal": 0.8}

CLAIMS = [
    Claim(
        name="ofq",
        says="StatsQ beats learned steps at two bits; the product of projections and annealing add to it.",
        base="vit",
        arms={
            "lsq": Arm(learned_steps),
            "statsq": Arm(OFQ(**PLAIN).callbacks),
            "product": Arm(OFQ(teacher=None, boundary=None).callbacks),
            "product, annealed": Arm(OFQ(teacher=None, anneal=0.8).callbacks),
            "product, annealed, taught": Arm(OFQ(anneal=0.8).callbacks),
        },
        holds=each_step_helps,
        expected="lsq < statsq; product, annealed >= statsq and product",
        metric="val_accuracy",
        steps=600,
    ),
    Claim(
        name="ofq-flips",
        says="A statistical scale flips fewer codes than a learned one; annealing brings flips to almost none.",
        base="vit",
        arms={
            "lsq": Arm(watched(learned_steps), metric=flips),
            "statsq": Arm(watched(OFQ(**PLAIN).callbacks), metric=flips),
            "statsq, annealed": Arm(watched(OFQ(**ANNEALED).callbacks), metric=flips),
        },
        holds=calm,
        expected="statsq < lsq; statsq, annealed below a fifth of statsq",
        metric="flips per step",
        steps=600,
    ),
]
