"""The pictures of docs/gallery.md and the strip of the README, drawn with the bundled model. None is chosen.

python -m training.gallery docs/images
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

import sdjax
from sdjax.schedulers import SAMPLERS
from training.evaluate import contact_sheet, pictures_of

PROMPTS = ("a large red star on a white background", "a blue ring above a yellow square on a black background")
SEED = 1
STRIP = (
    "a red circle on a blue background",
    "a green star above a purple square on a white background",
    "a white ring",
    "a blue star",
    "a red star on a blue background",
    "a small yellow star to the left of a black ring on a white background",
    "a red circle",
    "three orange triangles, purple background",
)
"""Prompts of the README, and one with a number; prompt i is drawn from seed i."""
GAP, LABEL = 4, 14


def sheet(rows: Mapping[str, Sequence[Image.Image]], heads: Sequence[str]) -> Image.Image:
    """Pictures in labelled rows under labelled columns, each column as wide as its pictures."""
    first = next(iter(rows.values()))
    side = first[0].height
    label = 8 + 7 * max(map(len, rows))
    lefts = [label + i * (side + GAP) for i in range(len(first))]
    made = Image.new("RGB", (lefts[-1] + side + GAP, LABEL + len(rows) * (side + GAP)), "white")
    pen = ImageDraw.Draw(made)
    for left, head in zip(lefts, heads, strict=True):
        pen.text((left, 1), head, fill="black")
    for i, (name, pictures) in enumerate(rows.items()):
        top = LABEL + i * (side + GAP)
        pen.text((4, top + side // 2 - 6), name, fill="black")
        for left, picture in zip(lefts, pictures, strict=True):
            made.paste(picture, (left, top))
    return made


def strip(pipe: sdjax.Pipeline) -> Image.Image:
    """The README's strip: its prompts side by side."""
    return contact_sheet(pictures_of(pipe, STRIP), len(STRIP))


def samplers(pipe: sdjax.Pipeline) -> Image.Image:
    """Every sampler at 4, 8 and 20 steps."""
    counts = (4, 8, 20)
    rows = {
        name: [pipe(prompt, seed=SEED, steps=steps, sampler=name).images[0] for steps in counts for prompt in PROMPTS]
        for name in SAMPLERS
    }
    heads = [f"{steps} steps" if i == 0 else "" for steps in counts for i in range(len(PROMPTS))]
    return sheet(rows, heads)


def strengths(pipe: sdjax.Pipeline) -> Image.Image:
    """One picture painted over at growing strength."""
    start = pipe("a large yellow star on a blue background", seed=SEED).images[0]
    shares = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0)
    prompts = ("a large red star on a blue background", "a white circle on a green background")
    rows = {
        prompt: [pipe(prompt, seed=1, image=start, strength=share).images[0] for share in shares] for prompt in prompts
    }
    return sheet(rows, [f"{share:g}" for share in shares])


def inpainting(pipe: sdjax.Pipeline) -> Image.Image:
    """A picture, a mask, and what three seeds put there."""
    start = pipe("a small white square on the left of a blue background", seed=70).images[0]
    mask = np.zeros((start.height, start.width), np.uint8)
    mask[: start.height // 2, start.width // 2 :] = 255
    prompts = ("a red circle on a blue background", "a green star on a blue background")
    rows = {}
    for prompt in prompts:
        out = pipe(prompt, image=start, mask=mask, strength=1.0, padding_mask_crop=0, seed=0, num_images=4)
        rows[prompt] = [start, Image.fromarray(mask).convert("RGB"), *out.images]
    return sheet(rows, ["image", "mask", "seed 0", "1", "2", "3"])


DRAWN: Mapping[str, Callable[[sdjax.Pipeline], Any]] = MappingProxyType(
    {"strip": strip, "samplers": samplers, "strengths": strengths, "inpainting": inpainting}
)


def main() -> None:
    """Draw from the command line."""
    parser = argparse.ArgumentParser(description="Draw the pictures of the gallery.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", choices=DRAWN)
    args = parser.parse_args()
    pipe = sdjax.Pipeline.from_pretrained()
    for name, draw in DRAWN.items():
        if args.only in (None, name):
            draw(pipe).save(args.folder / f"{name}.png")


if __name__ == "__main__":
    main()
