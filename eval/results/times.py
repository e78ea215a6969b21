"""How far stored times can be believed: intervals over requests, and what disturbed them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from eval.results.records import Timing

LEVEL = 0.95
WIDE = 0.1  # half an interval over the mean: beyond it the time says little


def interval(column: str, timings: Sequence[Timing]) -> tuple[float, float] | None:
    """A 95 % interval of a row's `ttft_ms` or `throughput`: the mean of its tasks' means.

    Requests are the sample (t quantile, Satterthwaite's degrees of freedom over the tasks);
    throughput is a ratio, of tokens to seconds, and its variance is that of the linearized ratio.
    None without two requests in every task.
    """
    if not timings or min(len(timing.samples) for timing in timings) < 2:
        return None
    from scipy.stats import t

    parts = [_TERMS[column](np.array(timing.samples, float)) for timing in timings]

    mean = sum(value for value, _ in parts) / len(parts)
    variances = np.array([terms.var(ddof=1) / len(terms) for _, terms in parts]) / len(parts) ** 2
    whole, freedom = variances.sum(), np.array([len(terms) - 1 for _, terms in parts])
    if whole == 0:
        return mean, mean
    quantile = t.ppf((1 + LEVEL) / 2, whole**2 / (variances**2 / freedom).sum())
    half = float(quantile * np.sqrt(whole))
    return max(0.0, mean - half), mean + half


def paired_ratio(ours: Timing, base: Timing) -> tuple[float, float] | None:
    """TTFT over another row's on the same requests, timed in turn: mean ratio, half an interval.

    None if the requests are not as many, or fewer than two.
    """
    first, other = (np.array(each.samples, float)[:, 0] for each in (ours, base))
    if len(first) != len(other) or len(first) < 2:
        return None
    from scipy.stats import t

    ratios = first / other
    error = ratios.std(ddof=1) / np.sqrt(len(ratios))
    return float(ratios.mean()), float(t.ppf((1 + LEVEL) / 2, len(ratios) - 1) * error)


def notes(rows: Mapping[str, Mapping[str, Timing]]) -> list[str]:
    """What must be said below a table of times: over how many requests, and every warning."""
    timings = [timing for tasks in rows.values() for timing in tasks.values()]
    if not timings:
        return []
    counts = sorted({timing.requests for timing in timings})
    many = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    asked = f"{many} request{'s' * (counts[-1] > 1)} per row and task"
    said = [f"Times are means over {asked}, one at a time; [low, high] of them is over requests."]
    prepared = [each.preparation_ms for each in timings if each.preparation_ms is not None]
    if prepared:
        mean = sum(prepared) / len(prepared)
        said.append(
            f"TTFT begins when pixels and prompt are prepared; preparing took {mean:.1f} ms more."
        )
    return said + _warnings(rows)


def _warnings(rows: Mapping[str, Mapping[str, Timing]]) -> list[str]:
    found: dict[str, list[str]] = {}  # warning -> rows
    for name, tasks in rows.items():
        for warning in dict.fromkeys(w for timing in tasks.values() for w in timing.warnings or ()):
            found.setdefault(_kind(warning), []).append(name)
        around = interval("ttft_ms", [*tasks.values()]) if tasks else None
        if around and around[1] - around[0] > WIDE * (around[0] + around[1]):
            found.setdefault(f"TTFT is uncertain by more than {WIDE:.0%}", []).append(name)
    return [
        f"WARNING: {warning} ({_some(names)}): time again on a quiet machine."
        for warning, names in found.items()
    ]


def _kind(warning: str) -> str:
    """A warning without its own number, so that equal ones stand together."""
    return warning.partition(":")[0]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def _ttft_terms(samples: np.ndarray) -> tuple[float, np.ndarray]:
    return float(1000 * samples[:, 0].mean()), 1000 * samples[:, 0]


def _throughput_terms(samples: np.ndarray) -> tuple[float, np.ndarray]:
    _, seconds, tokens = samples.T
    value = tokens.sum() / seconds.sum()
    return float(value), (tokens - value * seconds) / seconds.mean()


_TERMS = {"ttft_ms": _ttft_terms, "throughput": _throughput_terms}
