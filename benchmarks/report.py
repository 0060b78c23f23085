"""Results as lines, as a plot, and compared with earlier ones."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def line(result: Mapping[str, Any]) -> str:
    """One line for a case: the seconds of every side, and how the peers compare."""
    parts = [result["name"]]
    for side, measured in result["sides"].items():
        if "skipped" in measured:
            parts.append(f"{side}: skipped ({measured['skipped']})")
            continue
        text = f"{side}: {measured['seconds']:.4g} s ±{measured['spread'] / 2:.0%}"
        text += f", {measured['peak_host_bytes'] / 2**30:.2f} GiB"
        if measured.get("peak_device_bytes"):
            text += f" + {measured['peak_device_bytes'] / 2**30:.2f} GiB on the device"
        if measured.get("fraction_of_peak"):
            text += (
                f", {measured['flops_per_second'] / 1e9:.0f} GFLOP/s ({measured['fraction_of_peak']:.0%} of a matmul)"
            )
        if "ratio" in measured:
            ratios = {"paired": "paired_ratio", "processor time": "cpu_ratio", "memory": "memory_ratio"}
            others = [f"{name} {measured[key]:.2f}" for name, key in ratios.items() if key in measured]
            text += f", ratio {measured['ratio']:.2f} ({', '.join(others)})"
        parts.append(text)
    return " | ".join(parts)


def plot(results: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draw the speed of every side relative to sdjax, a group of bars for each case."""
    from matplotlib.figure import Figure

    shown = [(result["name"], _speeds(result["sides"])) for result in results]
    sides = list(dict.fromkeys(side for _, speeds in shown for side in speeds))
    figure = Figure(figsize=(8, 1.2 + 0.5 * len(shown) * max(1, len(sides)) ** 0.5), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / max(1, len(sides))
    for index, side in enumerate(sides):
        places = [i + (index - (len(sides) - 1) / 2) * height for i in range(len(shown))]
        axes.barh(places, [speeds.get(side, 0.0) for _, speeds in shown], height, label=side)
    axes.set_yticks(range(len(shown)), [name for name, _ in shown])
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("speed, sdjax = 1")
    axes.legend()
    figure.savefig(file)


def _speeds(sides: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    return {
        side: 1.0 if side == "sdjax" else 1 / measured["ratio"]
        for side, measured in sides.items()
        if "ratio" in measured or (side == "sdjax" and "seconds" in measured)
    }


def compare(before: Path, after: Path, *, tolerance: float) -> tuple[list[str], bool]:
    """Compare two JSON files case by case.

    Where both have the same peer, its ratios are compared, since the machine's weather is in both of its terms; else
    the seconds are.

    Args:
        before: written by an earlier run.
        after: written by a later one.
        tolerance: by what factor a case may have become slower, such as 1.1.

    Returns:
        A line for each case that both have, and whether all are within the tolerance.
    """
    old, new = (_by_name(json.loads(file.read_text(encoding="utf-8"))["results"]) for file in (before, after))
    lines, is_good = [], True
    for name in old.keys() & new.keys():
        slower = _slowdown(old[name]["sides"], new[name]["sides"])
        if slower is None:
            lines.append(f"{name}: not measured in both")
            continue
        factor, kind = slower
        is_good &= factor <= tolerance
        verdict = "ok" if factor <= tolerance else "SLOWER"
        lines.append(f"{name}: {factor:.3f} times the time by {kind} {verdict}")
    return sorted(lines), is_good


def _by_name(results: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {result["name"]: result for result in results}


def _slowdown(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[float, str] | None:
    for side in old:
        if "ratio" in old[side] and "ratio" in new.get(side, {}):
            return old[side]["ratio"] / new[side]["ratio"], f"the ratio to {side}"
    if "seconds" in old.get("sdjax", {}) and "seconds" in new.get("sdjax", {}):
        return new["sdjax"]["seconds"] / old["sdjax"]["seconds"], "seconds"
    return None
