"""diffusers' first picture: `python -m benchmarks.peer_picture CASE OUT [compile]`, the process that is timed."""

import json
import sys

import torch

from benchmarks.cases import Case
from benchmarks.sides.diffusers_eager import draw, loaded


def main(asked: str, out: str, *how: str) -> None:
    """Load, draw, and write the picture."""
    case = Case(**json.loads(asked))
    pipe = loaded(case)
    if "compile" in how:
        pipe.unet = torch.compile(pipe.unet)
    draw(pipe, case)[0].save(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
