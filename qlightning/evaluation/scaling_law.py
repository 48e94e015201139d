"""Compute-optimal QAT: how much of a token budget should be trained quantized, and what loss to expect.

Compute-Optimal Quantization-Aware Training (Dremov, Grangier, Katharopoulos, Hannun; ICLR 2026, arXiv 2509.22935), from
secondary sources: the optimal share and its one coefficient are as reported there; of the loss law only the form is
known to us, so its coefficients are an argument (`LossLaw`), fitted to your own runs (`fit_loss_law`).

Everything is a function of S = tokens / (parameters * bits / 8), the tokens per byte of the deployed parameters.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

REPORTED = 6.7297
"""The coefficient `a` of the optimal share as the paper fitted it; it reports a mean absolute error of 0.091."""

STUDIED_PARAMS, STUDIED_TOKENS = (86e6, 2.2e9), (2.3e9, 1.4e12)
"""What the paper's 757 runs span."""


def tokens_per_byte(params: float, tokens: float, bits: float) -> float:
    """S: tokens per byte of the quantized parameters.

    >>> tokens_per_byte(1e9, 5e11, 4)
    1000.0
    """
    for name, value in (("params", params), ("tokens", tokens), ("bits", bits)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value}: a positive number, as in plan_qat(params=1e9, tokens=5e11, bits=4)")
    return tokens / (params * bits / 8)


def optimal_share(tokens_per_byte: float, *, a: float = REPORTED) -> float:
    """The share of the tokens that is best trained quantized, exp(-a / ln S).

    It is 0 for S <= 1, its limit there: the law has no meaning below one token per byte.

    >>> round(optimal_share(1000), 3), optimal_share(0.5)
    (0.377, 0.0)
    """
    return math.exp(-a / math.log(tokens_per_byte)) if tokens_per_byte > 1 else 0.0


class LossLaw(NamedTuple):
    """The loss after `fp_tokens` in float and then `qat_tokens` quantized, with coefficients fitted to runs.

        L = alpha + beta / D^gamma + zeta / N^eta
          + theta 2^(-kappa B)                                              the floor of B bits
          + phi 2^(-chi B) / (N^psi S_qat^omega)                            too little QAT
          + lambda 2^(-mu B) / (N^nu S_fp^xi S_qat^rho)                     what float training does to QAT

    N parameters, D tokens in all, B bits, S_fp and S_qat tokens per byte of the two phases. The first line is
    Chinchilla's. The sign of xi is free (sources disagree on it); everything else is positive.
    """

    alpha: float
    beta: float
    gamma: float
    zeta: float
    eta: float
    theta: float
    kappa: float
    phi: float
    chi: float
    psi: float
    omega: float
    lambda_: float
    mu: float
    nu: float
    xi: float
    rho: float

    def loss(self, *, params: float, fp_tokens: float, qat_tokens: float, bits: float) -> float:
        """The predicted loss of one run."""
        run = torch.tensor([[params, fp_tokens, qat_tokens, bits]], dtype=torch.float64)
        return float(_loss(torch.tensor(self, dtype=torch.float64), run))


class Run(NamedTuple):
    """A finished run: what was trained how long, and its final loss."""

    params: float
    fp_tokens: float
    qat_tokens: float
    bits: float
    loss: float


class Plan(NamedTuple):
    """How to spend a token budget.

    Attributes:
        fraction: Share of the tokens that is trained quantized.
        fp_tokens: Tokens of the float phase.
        qat_tokens: Tokens of the quantized phase; both sum to the budget.
        start: The float phase as a share of the run: QATCallback(start=plan.start), and where the decay begins when it
            is fused with QAT, WarmupStableDecay(decay=plan.fraction).
        loss: The predicted loss, or None without a law.
        studied: Whether the paper's runs span this size and budget; beyond them the plan is an extrapolation.
    """

    fraction: float
    fp_tokens: int
    qat_tokens: int
    start: float
    loss: float | None
    studied: bool


def plan_qat(*, params: float, tokens: float, bits: float, a: float = REPORTED, law: LossLaw | None = None) -> Plan:
    """The best split of a token budget into float training and QAT.

    >>> plan = plan_qat(params=86e6, tokens=2e9, bits=4)
    >>> round(plan.fraction, 3), plan.fp_tokens + plan.qat_tokens, plan.studied
    (0.173, 2000000000, False)

    Args:
        params: Number of parameters N.
        tokens: The budget D.
        bits: Bits per weight B.
        a: Coefficient of the optimal share.
        law: A fitted loss law; the share is then the one that makes its loss smallest, and `a` is not used.

    Raises:
        ValueError: An argument is not positive, or the budget is so small that the law leaves no token for a phase.
    """
    ratio, budget = tokens_per_byte(params, tokens, bits), round(tokens)
    share = optimal_share(ratio, a=a) if law is None else _best_share(law, params, budget, bits)
    qat_tokens = round(share * budget)
    if not 0 < qat_tokens < budget:
        raise ValueError(
            f"{tokens:.3g} tokens are {ratio:.3g} per byte of {params:.3g} parameters at {bits} bits: the law only "
            "holds well above 1; choose the share yourself, for example QATCallback(start=0.5)"
        )
    loss = None
    if law is not None:
        loss = law.loss(params=params, fp_tokens=budget - qat_tokens, qat_tokens=qat_tokens, bits=bits)
    spans = STUDIED_PARAMS[0] <= params <= STUDIED_PARAMS[1] and STUDIED_TOKENS[0] <= tokens <= STUDIED_TOKENS[1]
    start = (budget - qat_tokens) / budget
    return Plan(share, budget - qat_tokens, qat_tokens, start, loss, spans and bits <= 6)


def compare_sizes(
    *, deployed_bytes: float, tokens: float, bits: Sequence[float], law: LossLaw
) -> list[tuple[float, float, Plan]]:
    """Which model to train when its deployed weights may have so many bytes: (parameters, bits, plan), best first."""
    sizes = [(deployed_bytes * 8 / b, b) for b in bits]
    plans = [(params, b, plan_qat(params=params, tokens=tokens, bits=b, law=law)) for params, b in sizes]
    return sorted(plans, key=lambda row: row[2].loss or 0.0)


def _best_share(law: LossLaw, params: float, budget: int, bits: float) -> float:
    """By a grid in the logit of the share, refined twice."""
    low, high = -12.0, 12.0
    coefficients = torch.tensor(law, dtype=torch.float64)
    for _ in range(3):
        logits = torch.linspace(low, high, 401, dtype=torch.float64)
        shares = torch.sigmoid(logits)
        columns = (
            torch.full_like(shares, params),
            (1 - shares) * budget,
            shares * budget,
            torch.full_like(shares, bits),
        )
        best = int(_loss(coefficients, torch.stack(columns, 1)).argmin())
        low, high = float(logits[max(0, best - 1)]), float(logits[min(400, best + 1)])
    return float(shares[best])


def _loss(c: Tensor, run: Tensor) -> Tensor:
    """(R,) losses of runs (R, 4) of params, fp_tokens, qat_tokens, bits, in float64."""
    alpha, beta, gamma, zeta, eta, theta, kappa, phi, chi, psi, omega, lambda_, mu, nu, xi, rho = c.unbind()
    params, fp, qat, bits = run.unbind(1)
    weight_bytes = params * bits / 8
    n, s_fp, s_qat = params.log(), (fp / weight_bytes).log(), (qat / weight_bytes).log()
    bit = bits * math.log(2)
    float_loss = alpha + beta * torch.exp(-gamma * (fp + qat).log()) + zeta * torch.exp(-eta * n)
    little = phi * torch.exp(-chi * bit - psi * n - omega * s_qat)
    interaction = lambda_ * torch.exp(-mu * bit - nu * n - xi * s_fp - rho * s_qat)
    return float_loss + theta * torch.exp(-kappa * bit) + little + interaction


def fit_loss_law(runs: Sequence[Run], *, starts: int = 16, delta: float = 1e-3, seed: int = 0) -> LossLaw:
    """The loss law that fits finished runs: Huber loss between logarithms, by L-BFGS from several starts.

    With runs that hardly differ in N, D, B or the share, many coefficients predict alike: trust the predicted losses
    between the runs, not single coefficients.

    Args:
        runs: Finished runs, more than the law has coefficients.
        starts: Number of random starts.
        delta: Residual of log L beyond which a run counts linearly and not quadratically.
        seed: Of the starts.
    """
    free = list(LossLaw._fields).index("xi")
    if len(runs) <= len(LossLaw._fields):
        raise ValueError(
            f"{len(runs)} runs cannot fit {len(LossLaw._fields)} coefficients: give more, of various sizes"
        )
    data = torch.tensor([tuple(run) for run in runs], dtype=torch.float64)
    observed = data[:, 4].log()

    def coefficients(raw: Tensor) -> Tensor:
        positive = raw.clamp(max=40.0).exp()
        return torch.where(torch.arange(len(raw)) == free, raw, positive)

    def residuals(raw: Tensor) -> Tensor:
        return _loss(coefficients(raw), data[:, :4]).log() - observed

    def draw(random: np.random.Generator) -> np.ndarray:
        """Every term of the order of the losses' spread, every exponent between 0.1 and 1."""
        law = dict.fromkeys(LossLaw._fields, 0.0) | {
            name: math.log(random.uniform(0.1, 1.0))
            for name in ("gamma", "eta", "kappa", "chi", "psi", "omega", "mu", "nu", "rho")
        }
        size = float(data[:, 4].min())
        law |= {"alpha": math.log(size * random.uniform(0.2, 0.9)), "xi": random.uniform(-0.3, 0.3)}
        total, n = (data[:, 1] + data[:, 2]).log().mean(), data[:, 0].log().mean()
        law["beta"] = math.log(size * random.uniform(0.1, 0.5)) + math.exp(law["gamma"]) * float(total)
        law["zeta"] = math.log(size * random.uniform(0.1, 0.5)) + math.exp(law["eta"]) * float(n)
        law["theta"] = math.log(size * random.uniform(0.1, 1.0))
        law["phi"] = math.log(size * random.uniform(0.1, 1.0)) + math.exp(law["psi"]) * float(n)
        law["lambda_"] = math.log(size * random.uniform(0.1, 1.0)) + math.exp(law["nu"]) * float(n)
        return np.array([law[name] for name in LossLaw._fields])

    raw = fit(residuals, draw, starts=starts, delta=delta, seed=seed)
    return LossLaw(*coefficients(torch.from_numpy(raw)).tolist())


def fit_share(observed: Sequence[tuple[float, float]], *, delta: float = 0.05) -> float:
    """The coefficient `a` of `optimal_share` that fits measured optima, robustly.

    Args:
        observed: (tokens per byte, best share) of each budget; S above 1.
        delta: Residual of the share beyond which an optimum counts linearly.
    """
    data = torch.tensor(observed, dtype=torch.float64)
    if data.dim() != 2 or bool((data[:, 0] <= 1).any()):
        raise ValueError("write pairs of tokens per byte (above 1) and best share: fit_share([(50.0, 0.2), ...])")
    raw = fit(
        lambda raw: torch.exp(-raw.exp() / data[:, 0].log()) - data[:, 1],
        lambda random: np.array([random.uniform(0.0, 3.0)]),
        starts=8,
        delta=delta,
        seed=0,
    )
    return math.exp(raw[0])


def fit(
    residuals: Callable[[Tensor], Tensor],
    draw: Callable[[np.random.Generator], np.ndarray],
    *,
    starts: int,
    delta: float,
    seed: int,
) -> np.ndarray:
    """Coefficients with the smallest mean Huber loss of the residuals, by L-BFGS from several starts.

    Args:
        residuals: Residuals (R,) of coefficients (C,), float64 and differentiable.
        draw: A random start (C,).
        starts: Number of starts.
        delta: Where the Huber loss turns from quadratic to linear.
        seed: Of the starts.

    Raises:
        ValueError: No start led to finite residuals.
    """
    from scipy.optimize import minimize

    def objective(point: np.ndarray) -> tuple[float, np.ndarray]:
        raw = torch.from_numpy(point.copy()).requires_grad_()
        error = residuals(raw)
        # in units of delta^2, or L-BFGS would take the tiny numbers for convergence
        loss = torch.nn.functional.huber_loss(error / delta, torch.zeros_like(error))
        (gradient,) = torch.autograd.grad(loss, raw)
        if not bool(torch.isfinite(loss)) or not bool(torch.isfinite(gradient).all()):
            return 1e300, np.zeros_like(point)
        return float(loss.detach()), gradient.numpy()

    random = np.random.default_rng(seed)
    options = {"maxiter": 3000, "maxfun": 5000, "maxcor": 30, "ftol": 1e-15, "gtol": 1e-9}
    fits = [minimize(objective, draw(random), jac=True, method="L-BFGS-B", options=options) for _ in range(starts)]
    best = min(fits, key=lambda found: float(found.fun))
    if best.fun >= 1e300:
        raise ValueError("no start gave finite predictions: check the runs for zero or infinite entries")
    return np.asarray(best.x)
