"""What the server's benchmarks say of times."""

from collections.abc import Mapping, Sequence

import numpy as np

SHOWN = ("mean", "p50", "p95", "p99", "most")


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Mean, median, p95, p99 and the largest."""
    values = np.asarray(seconds)
    p50, p95, p99 = np.percentile(values, [50, 95, 99])
    found = (values.mean(), p50, p95, p99, values.max())
    return {name: float(value) for name, value in zip(SHOWN, found, strict=True)}


def histogram_percentiles(buckets: Mapping[float, float], total_seconds: float) -> dict[str, float]:
    """Likewise from a histogram, linear within its buckets as Prometheus has it; "most" is the bound of the last one
    that isn't empty.

    Args:
        buckets: counts of what was no longer than a bound in seconds (cumulative), the last bound infinite.
        total_seconds: the sum of everything that was counted.
    """
    bounds, counts = np.array(sorted(buckets)), np.array([buckets[bound] for bound in sorted(buckets)])
    finite = np.where(np.isinf(bounds), bounds[-2], bounds)
    total = counts[-1]
    p50, p95, p99 = np.interp(np.array([0.5, 0.95, 0.99]) * total, [0.0, *counts], [0.0, *finite])
    last = bounds[int(np.searchsorted(counts, total))]
    found = (total_seconds / total, p50, p95, p99, last)
    return {name: float(value) for name, value in zip(SHOWN, found, strict=True)}
