"""Does a model draw what it is told? Prompts held out of training, read back from the pixels.

    python -m training.evaluate --json evaluation.json --grid grid.png

Prints the share of prompts of which each statement holds, beside three others: the drawings themselves (how well the
checker reads), the drawings after the autoencoder (the most that a model could reach), and the model's pictures
checked against another prompt's scene (what luck would reach).
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import sdjax
from sdjax.models import bind
from training.captions import full_caption
from training.checker import Verdict, check
from training.drawings import Scene, draw, sample_held_out_scene

PROMPTS = 256
AT_ONCE = 32
CRITERIA = ("background", "every color", "every kind", "count", "relation", "place")


def scenes_and_prompts(count: int) -> tuple[list[Scene], list[str]]:
    """The evaluation's scenes, all of combinations held out of training, and a full caption of each."""
    rng = np.random.default_rng(20)
    scenes = [sample_held_out_scene(rng) for _ in range(count)]
    return scenes, [full_caption(scene, rng) for scene in scenes]


def statements(verdict: Verdict) -> tuple[bool | None, ...]:
    """Which of the criteria hold; None where a scene makes no such statement."""
    every_color = verdict.background and verdict.colors
    return verdict.background, every_color, verdict.kinds, verdict.count, verdict.relation, verdict.place


def shares(pictures: Sequence[NDArray[np.uint8]], scenes: Sequence[Scene]) -> dict[str, float]:
    """Of each criterion, the percentage of the scenes that it concerns of which it holds."""
    table = [statements(check(picture, scene)) for picture, scene in zip(pictures, scenes, strict=True)]
    columns = zip(*table, strict=True)
    return {
        name: 100 * float(np.mean([entry for entry in column if entry is not None]))
        for name, column in zip(CRITERIA, columns, strict=True)
    }


def pictures_of(pipe: "sdjax.Pipeline", prompts: Sequence[str], **settings: object) -> list[NDArray[np.uint8]]:
    """Draw prompts in batches, prompt i from seed i."""
    drawn: list[NDArray[np.uint8]] = []
    for first in range(0, len(prompts), AT_ONCE):
        out = pipe(prompts[first : first + AT_ONCE], seed=first, **settings)  # type: ignore[arg-type]
        drawn += [np.asarray(image) for image in out.images]
    return drawn


def through_autoencoder(pipe: "sdjax.Pipeline", drawings: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
    """Encode and decode drawings."""
    vae = bind(pipe.definition.vae, pipe.params["vae"])
    redrawn = vae.decode(vae.encode(np.stack(drawings) / np.float32(127.5) - 1).mean)
    return list(np.asarray(np.clip(np.round((np.asarray(redrawn) + 1) * 127.5), 0, 255), np.uint8))


def contact_sheet(pictures: Sequence[NDArray[np.uint8]], columns: int) -> Image.Image:
    """Pictures side by side in rows, on grey."""
    side, gap = pictures[0].shape[0], 4
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (side + gap) + gap, rows * (side + gap) + gap), (128, 128, 128))
    for i, picture in enumerate(pictures):
        row, column = divmod(i, columns)
        sheet.paste(Image.fromarray(picture), (gap + column * (side + gap), gap + row * (side + gap)))
    return sheet


def main() -> None:
    """Evaluate from the command line."""
    parser = argparse.ArgumentParser(description="Check what a model draws against what it was told.")
    parser.add_argument("--model", default=None)
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sampler", default=None)
    parser.add_argument("--schedule", default=None)
    parser.add_argument("--guidance", type=float, default=None)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--grid", type=Path, help="a sheet of the first 64 pictures")
    parser.add_argument("--failures", type=Path, help="a sheet of pictures that miss a statement")
    args = parser.parse_args()
    pipe = sdjax.Pipeline.from_pretrained(args.model)
    scenes, prompts = scenes_and_prompts(args.prompts)
    drawings = [draw(scene) for scene in scenes]
    settings = {
        "steps": args.steps,
        "sampler": args.sampler,
        "schedule": args.schedule,
        "guidance_scale": args.guidance,
    }
    drawn = pictures_of(pipe, prompts, **settings)
    rows = {
        "true drawings": shares(drawings, scenes),
        "through the autoencoder": shares(through_autoencoder(pipe, drawings), scenes),
        "model": shares(drawn, scenes),
        "model, prompts shuffled": shares(drawn, scenes[1:] + scenes[:1]),
    }
    width = max(map(len, rows))
    print(" " * width, *(f"{name:>12}" for name in CRITERIA))
    for label, row in rows.items():
        print(f"{label:{width}}", *(f"{row[name]:11.1f}%" for name in CRITERIA))
    if args.json:
        args.json.write_text(
            json.dumps({"settings": settings, "prompts": args.prompts, "percent": rows}, indent=2) + "\n"
        )
    if args.grid:
        contact_sheet(drawn[:64], 16).save(args.grid)
    if args.failures:
        missed = [
            picture
            for picture, scene in zip(drawn, scenes, strict=True)
            if not all(entry is not False for entry in statements(check(picture, scene)))
        ]
        if missed:
            contact_sheet(missed[:32], 16).save(args.failures)


if __name__ == "__main__":
    main()
