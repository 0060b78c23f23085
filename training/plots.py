"""The losses of the training runs as one picture.

python -m training.plots runs docs/images/loss.png
"""

import argparse
import json
from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt

STAGES = {"autoencoder": "l1", "text": "loss", "diffusion": "loss"}
"""The folder of each run, and what to plot of its log."""
WINDOW = 25
"""Log lines that the darker curve averages over."""


def main() -> None:
    """Plot from the command line."""
    parser = argparse.ArgumentParser(description="Plot the losses of the training runs.")
    parser.add_argument("runs", type=Path, help="the folder with the stages' run folders")
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    figure, axes = plt.subplots(1, len(STAGES), figsize=(12, 3), layout="constrained")
    for axis, (stage, metric) in zip(axes, STAGES.items(), strict=True):
        lines = [json.loads(line) for line in (args.runs / stage / "log.jsonl").read_text().splitlines()]
        steps, values = np.array([(line["step"], line[metric]) for line in lines]).T
        axis.plot(steps, values, color="0.8", linewidth=0.8)
        middle = np.convolve(values, np.ones(WINDOW) / WINDOW, "valid")
        axis.plot(steps[WINDOW // 2 :][: len(middle)], middle, color="tab:blue")
        axis.set(title=f"{stage}: {metric}", xlabel="step", yscale="log")
        axis.grid(visible=True, which="both", alpha=0.3)
    figure.savefig(args.picture, dpi=80)


if __name__ == "__main__":
    main()
