"""What the bundled LoRA does, measured in pixels: hollow shapes, and whether the prompt is still followed.

    python -m training.lora_evaluate --file sdjax/bundled/loras/outline.safetensors --sheet docs/lora.png

For each weight it prints how many shapes are hollow, in pictures of prompts without rings, and what the checker says of
the pictures with their holes filled. The sheet has a row for each weight, the same prompts and seeds in each.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import sdjax
from training.captions import plain_caption
from training.drawings import Picture, Scene, sample_held_out_scene
from training.evaluate import contact_sheet, pictures_of, shares
from training.outlines import filled, hollow_share

WEIGHTS = (0.0, 0.5, 1.0)
SHEET_PROMPTS = (
    "a red circle on a white background",
    "a yellow star on a blue background",
    "a green triangle to the left of a purple square on a white background",
    "an orange square above a blue circle on a black background",
    "a white star below a green circle on a purple background",
    "a large blue triangle on an orange background",
)


def scenes_and_prompts(count: int) -> tuple[list[Scene], list[str]]:
    """Scenes without rings, of combinations held out of training, and a plain full caption of each."""
    rng = np.random.default_rng(21)
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = sample_held_out_scene(rng)
        if all(shape.kind != "ring" for shape in scene.shapes):
            scenes.append(scene)
    return scenes, [plain_caption(scene) for scene in scenes]


def measured(pictures: Sequence[Picture], scenes: Sequence[Scene]) -> dict[str, float]:
    """The percentage of shapes that are hollow, and what the checker says of the pictures without holes."""
    hollow = 100 * float(np.nanmean([hollow_share(picture) for picture in pictures]))
    return {"hollow": hollow, **shares([filled(picture) for picture in pictures], scenes)}


def main() -> None:
    """Measure from the command line."""
    parser = argparse.ArgumentParser(description="Measure the bundled LoRA.")
    parser.add_argument("--file", type=Path, default=Path("sdjax/bundled/loras/outline.safetensors"))
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--sheet", type=Path)
    args = parser.parse_args()
    pipe = sdjax.Pipeline.from_pretrained()
    scenes, prompts = scenes_and_prompts(args.prompts)
    rows = []
    for weight in WEIGHTS:
        loras = [(args.file, weight)]
        row = measured(pictures_of(pipe, prompts, loras=loras), scenes)
        print(f"weight {weight}:", *(f"{name} {share:.1f} %," for name, share in row.items()))
        rows += pictures_of(pipe, SHEET_PROMPTS, loras=loras)
    if args.sheet:
        contact_sheet(rows, len(SHEET_PROMPTS)).save(args.sheet, optimize=True)


if __name__ == "__main__":
    main()
