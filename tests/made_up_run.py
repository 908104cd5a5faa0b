"""A made-up run for tests of the report: NOT a measurement. Its numbers come from closed forms of two random spectra.

`made_up_run("group")` has the blocks base and peft, `made_up_run("layer")` four layers of each; both have what a report must
survive: a number that is not resolved, a fit that is not identified, an infinite loss change, a rule that cannot give
a rate.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from hybridtheory.estimate import Estimate
from probes import records as R
from probes import records_smoothness as S

GROWTH = (1.0, 1.8, 2.6)  # curvature grows along the run


def spectrum(d: int, top: float, rng: np.random.Generator) -> np.ndarray:
    """d eigenvalues: a few outliers, a bulk around 0, some negative."""
    bulk = rng.normal(0, top * 3e-3, d - 8)
    return np.sort(np.concatenate([bulk, top * np.geomspace(1, 0.08, 7), [-0.25 * top]]))


def block_names(blocks: str) -> list[tuple[str, str, int, float]]:
    """(name, group, d, largest eigenvalue)."""
    if blocks == "group":
        return [("base", "base", 40_000, 350.0), ("peft", "peft", 600, 6.0)]
    base = [(f"base.layer.{i}", "base", 6_000, 350.0 / (1 + i)) for i in range(4)]
    return base + [(f"peft.layer.{i}", "peft", 100, 6.0 / (1 + 0.4 * i)) for i in range(4)]


def block_point(name: str, d: int, top: float, grad_norm: float, rng: np.random.Generator) -> S.BlockPoint:
    lam = spectrum(d, top, rng)
    trace, plus, square = lam.sum(), lam[lam > 0].sum(), (lam**2).sum()
    stderr = math.sqrt(2 * square / 24)
    weights, edges = np.histogram(lam, bins=80, density=False)
    return S.BlockPoint(
        grad_norm=grad_norm,
        lam_max=Estimate(lam[-1], residual=1e-3 * top, upper=1.03 * lam[-1], confidence=0.99, n=22),
        lam_min=Estimate(lam[0], residual=4e-3 * top, upper=1.1 * lam[0], confidence=0.99, n=22),
        trace=Estimate(
            trace + 0.4 * stderr,
            stderr=stderr,
            n=24,
            resolved=stderr < abs(trace) / 3,
            note="" if stderr < abs(trace) / 3 else "the standard error exceeds a third of the value after 24 vectors",
        ),
        trace_plus=Estimate(plus, stderr=0.06 * plus, n=4),
        trace_sq=Estimate(square, stderr=0.1 * square, n=4),
        effective_rank=Estimate(plus / lam[-1], stderr=0.06 * plus / lam[-1], n=4),
        density=S.Density((edges[1:] + edges[:-1]) / 2, weights / d, n=4),
        gHg=Estimate(0.3 * top, n=1),
        at_scale=S.AtScale(1e-3, {"trace": Estimate(1.1 * trace, stderr=stderr, n=24)})
        if name.startswith("base")
        else None,
        noise=Estimate(12 * grad_norm**2, stderr=grad_norm**2, n=16),
    )


def phi(trace: float, rng: np.random.Generator) -> S.Phi:
    delta = np.geomspace(1e-4, 1e-1, 10)
    mean = 0.5 * trace * delta**2 * (1 + (delta / 2e-2) ** 2)
    return S.Phi(delta, mean, 0.1 * mean, n=8, trace=Estimate(1.02 * trace, stderr=0.1 * trace, n=8), fit_up_to=3e-3)


def finite_scale(trace: float, g: float) -> S.FiniteScale:
    eta = np.geomspace(0.05, 20, 9) / trace
    change = -eta * g**2 + 0.5 * eta**2 * trace * g**2 * (1 + eta * trace)
    change[-1] = math.inf
    best = eta[int(np.argmin(change))]
    return S.FiniteScale(
        eta, change, 0.05 * np.abs(change) + 0.01 * (eta * trace) ** 2, best, (best / 1.5, best * 1.5), 0.95 * g, 12
    )


def made_up_run(blocks: str = "group", complete: bool = True) -> list[R.Record]:
    """Records in the order in which a probe yields them; complete=False stops after the second point."""
    rng = np.random.default_rng(0)
    names = block_names(blocks)
    infos = [
        R.BlockInfo(n, g, d, {} if g == "base" else {"rank": 4, "alpha": 8, "scale": 2.0, "init": "B = 0"})
        for n, g, d, _ in names
    ]
    out: list[R.Record] = [
        R.Header(
            probe="smoothness",
            seed=0,
            model=R.ModelInfo("made-up/[model]_1.2M", "ab" * 32, 1_200_000, "GPT2LMHeadModel", "float32"),
            data=R.DataInfo(
                "sentiment", "cd" * 32, rows=16, tokens=337.0, truncated=2, loss="cross-entropy of the label word"
            ),
            blocks=infos,
            peft=R.PeftInfo("lora", 4, 8.0, 2.0, "B = 0", {"targets": ["c_attn"]}),
            options={"blocks": blocks, "points": 3, "secants": 30, "micro_batch": None, "curvature": "hessian"},
            versions={"torch": "2.13.0", "transformers": "5.23.0", "hybridtheory": "0.1.0"},
            threads=2,
            git="0123456789abcdef",
            argv=["probe-smoothness", "made-up/[model]_1.2M", "--rank", "4"],
            started="2026-11-21T08:00:00Z",
            host="nowhere",
        ),
        R.Cost("estimated", 190, 160, 900, seconds=71.0, memory_bytes=3 << 29),
        R.Preflight(
            "ok",
            [
                R.Finding("same loss twice", 0.0, 0.0, True, "0.693 and 0.693"),
                R.Finding("base: v'g against differences of the loss", 3.1e-6, 2e-3, True),
                R.Finding("base: u'Hv = v'Hu", 4.0e-7, 1e-4, True),
                R.Finding("base: v'Hv against differences of gradients", 6.0e-5, 2e-2, True),
            ],
        ),
    ]
    for index, growth in enumerate(GROWTH if complete else GROWTH[:2]):
        g = {n: (60.0 if group == "base" else 4.0) / growth / math.sqrt(len(names) / 2) for n, group, _, _ in names}
        points = {n: block_point(n, d, top * growth, g[n], rng) for n, _, d, top in names}
        full = math.sqrt(sum(v * v for v in g.values()))
        traces = {n: points[n].trace_plus.value for n, *_ in names}
        out.append(
            R.Point(
                index,
                12 * index,
                2.4 - 0.5 * index,
                full,
                points,
                coupling=Estimate(18.0 * growth, residual=0.2, n=12),
                margin=Estimate(0.93, residual=0.01, n=14),
                phi={n: phi(traces[n], rng) for n, *_ in names[:2]},
                finite_scale={n: finite_scale(traces[n], g[n]) for n, group, *_ in names[:1]},
                seconds=14.0,
            )
        )
        for i in range(12 * index, 12 * index + 12):
            out.append(
                R.TrainStep(i, 2.4 - 0.04 * i, {"base": 1e-5, "peft": 0.1}, {"base": 60.0 / growth, "peft": 4.0})
            )
            for n, _, _, top in names:
                u = full * math.exp(rng.normal(0, 0.5))
                L = (0.4 * top + 0.02 * top * u / 10) * math.exp(rng.normal(-0.25, 0.2))
                move = ("gradient", "random", "joint")[i % 3]
                out.append(R.Secant(i, n, move, u, u * 0.9, 1e-2, 1.1 * L, L, index))
        out.append(R.Secant(12 * index, "all", "trajectory", full, full, 0.1, 90.0 * growth, None))
    out.append(R.Warning("2 of 16 rows were longer than 64 tokens and were truncated", "data"))
    if not complete:
        return out
    for n, _, _, top in names:
        for method in ("envelope", "quantile"):
            for argument in ("full", "block"):
                identified = n != names[-1][0]
                fit = R.Fit(
                    block=n,
                    data="secant",
                    method=method,
                    argument=argument,
                    L0=0.5 * top,
                    L1=0.002 * top,
                    n=36,
                    span=7.9 if identified else 2.1,
                    identified=identified,
                    violation_rate=0.06,
                    violation_interval=(0.01, 0.19),
                    note="" if identified else "gradient norms span a factor 2.1, 3 are needed",
                )
                if method == "quantile":
                    fit = replace(fit, L0=0.4 * top, L0_interval=(0.3 * top, 0.5 * top), L1_interval=(0.0, 0.004 * top))
                out.append(fit)
        out.append(
            replace(fit, data="spectral", method="envelope", argument="full", n=3, identified=False, L0_interval=None)
        )
    return out + rates() + [R.Cost("actual", 201, 171, 905, seconds=78.5, memory_bytes=3 << 29), R.End("finished")]


def rates() -> list[R.Record]:
    """All five rules, with a worst case that is absurd and a noise rule that cannot give the ratio."""
    out: list[R.Record] = []
    values = {
        "worst_case": (3.4e-9, 0.16, "1/(L (d+2))", "A0, worst case", "L and the dimension d"),
        "measured": (2.1e-4, 0.16, "1/(tr H + 2 g'Hg/|g|^2)", "Identity Q", "tr(H)"),
        "noise_limited": (
            4.0e-5,
            None,
            "sqrt(2 Delta/(T L ((r+2)) sigma^2))",
            "A0, noise-limited",
            "tr(H_+) and the upper end L",
        ),
        "finite_scale": (1.6e-4, None, "argmin E f(w - eta c u) - f(w)", "finite-scale rule", "forward passes only"),
        "tail": (6.0e-5, None, "q scale/(|g| sqrt(z))", "tail of a step", "the flat scale and |g|"),
    }
    for rule, (base, peft, formula, theorem, uses) in values.items():
        for where, k in (("first", 1.0), ("envelope", 0.4)):

            def rate(
                value: float | None, k: float = k, args: tuple[str, str, str] = (formula, theorem, uses)
            ) -> S.Rate:
                covers = "probe vectors and points, not rows"
                if value is None:
                    return S.Rate(None, None, "", *args, (), "no such rule for a first-order block")
                return S.Rate(k * value, (k * value / 1.4, k * value * 1.4), covers, *args)

            ratio = (
                S.Rate(peft / base, (peft / base / 2, peft / base * 2), "points", "(r+2) L_x/L_y")
                if peft
                else rate(None)
            )
            out.append(R.Rates(rule, where, rate(base), rate(peft), ratio))
    chosen = S.Rate(2.4e-5, (1.7e-5, 3.4e-5), "probe vectors, points", "min", "finite-scale rule")
    peft = S.Rate(0.064, (0.05, 0.08), "points", "1/L after coupling", "descent lemma")
    ratio = S.Rate(0.064 / 2.4e-5, (1.5e3, 4.7e3), "points")
    settings = {"mu": 1e-3, "q": 1, "law": "gaussian", "batch_size": 16, "steps": 1000, "optimizer": "sgd"}
    bound_by = {"base": "noise_limited", "peft": "measured", "ratio": "quotient of the two"}
    return [*out, R.Recommendation(chosen, peft, ratio, bound_by, settings)]
