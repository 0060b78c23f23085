"""Does a model draw what it is told? Prompts held out of training, read back from the pixels, wording by wording.

    python -m training.evaluate --json evaluation.json --table table.md --colors colors.png

For each of `training.captions.WORDINGS` it draws as many prompts of each kind, prompt i from seed i, with the model's
defaults, and prints the share of pictures in which everything that the prompt states is right, and that share of each
kind. Beside it stand two others: the drawings after the autoencoder, which is the most that a model could reach, and
the model's pictures checked against the next prompt's scene, which is what luck would reach.
"""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import sdjax
from sdjax.models import bind
from training.captions import WORDINGS, Wording, plain_caption
from training.checker import STATEMENTS, Statement, Verdict, check
from training.drawings import COLORS, KINDS, Color, Scene, draw, held_out, sample_group, sample_held_out_scene

EACH = 20
"""Pictures of each kind for each wording."""
AT_ONCE = 32
CRITERIA = ("background", "every color", "every kind", "count", "relation", "place")
Pictures = Sequence[NDArray[np.uint8]]


def scenes_for(wording: Wording, each: int) -> list[Scene]:
    """Scenes of combinations held out of training that a wording fits, the first shape of each kind in turn."""
    rng = np.random.default_rng([22, abs(wording.shapes), int(wording.shapes > 0)])
    scenes: list[Scene] = []
    while len(scenes) < each * len(KINDS):
        group = wording.shapes < 0
        scene = sample_group(rng, -wording.shapes) if group else sample_held_out_scene(rng, wording.shapes)
        if held_out(scene) and scene.shapes[0].kind == KINDS[len(scenes) % len(KINDS)]:
            scenes.append(scene)
    return scenes


def scenes_and_prompts(count: int) -> tuple[list[Scene], list[str]]:
    """Scenes of one shape or two, all of combinations held out of training, and a plain full caption of each."""
    rng = np.random.default_rng(20)
    scenes = [sample_held_out_scene(rng) for _ in range(count)]
    return scenes, [plain_caption(scene) for scene in scenes]


def statements(verdict: Verdict) -> tuple[bool | None, ...]:
    """Which of the criteria hold; None where a scene makes no such statement."""
    every_color = verdict.background and verdict.colors
    return verdict.background, every_color, verdict.kinds, verdict.count, verdict.relation, verdict.place


def shares(pictures: Pictures, scenes: Sequence[Scene]) -> dict[str, float]:
    """Of each criterion, the percentage of the scenes that it concerns of which it holds."""
    table = [statements(check(picture, scene)) for picture, scene in zip(pictures, scenes, strict=True)]
    columns = zip(*table, strict=True)
    return {
        name: 100 * float(np.mean([entry for entry in column if entry is not None]))
        for name, column in zip(CRITERIA, columns, strict=True)
    }


def right_shares(
    pictures: Pictures, scenes: Sequence[Scene], said: Sequence[Statement] = STATEMENTS
) -> dict[str, float]:
    """The percentage of pictures in which everything that was said is right: of all, and of each first shape's kind."""
    right = [check(picture, scene, said).everything for picture, scene in zip(pictures, scenes, strict=True)]
    kinds = [scene.shapes[0].kind for scene in scenes]
    groups = {"all": right} | {
        name: [holds for holds, kind in zip(right, kinds, strict=True) if kind == name] for name in KINDS
    }
    return {name: 100 * float(np.mean(some)) for name, some in groups.items() if some}


def pictures_of(pipe: "sdjax.Pipeline", prompts: Sequence[str], **settings: object) -> list[NDArray[np.uint8]]:
    """Draw prompts in batches, prompt i from seed i."""
    drawn: list[NDArray[np.uint8]] = []
    for first in range(0, len(prompts), AT_ONCE):
        out = pipe(prompts[first : first + AT_ONCE], seed=first, **settings)  # type: ignore[arg-type]
        drawn += [np.asarray(image) for image in out.images]
    return drawn


def native_size(pipe: "sdjax.Pipeline") -> int:
    """The side of a model's own pictures, in pixels."""
    return max(pipe.definition.native_size)


def through_autoencoder(pipe: "sdjax.Pipeline", drawings: Pictures) -> list[NDArray[np.uint8]]:
    """Encode and decode drawings."""
    vae = bind(pipe.definition.vae, pipe.params["vae"])
    redrawn: list[NDArray[np.uint8]] = []
    for first in range(0, len(drawings), AT_ONCE):
        batch = np.stack(drawings[first : first + AT_ONCE]) / np.float32(127.5) - 1
        decoded = np.asarray(vae.decode(vae.encode(batch).mean))
        redrawn += list(np.clip(np.round((decoded + 1) * 127.5), 0, 255).astype(np.uint8))
    return redrawn


def contact_sheet(pictures: Pictures, columns: int) -> Image.Image:
    """Pictures side by side in rows, on grey."""
    side, gap = pictures[0].shape[0], 4
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (side + gap) + gap, rows * (side + gap) + gap), (128, 128, 128))
    for i, picture in enumerate(pictures):
        row, column = divmod(i, columns)
        sheet.paste(Image.fromarray(picture), (gap + column * (side + gap), gap + row * (side + gap)))
    return sheet


def every_color_and_kind(pipe: "sdjax.Pipeline", **settings: object) -> Image.Image:
    """A sheet of "a {colour} {kind}", a row a kind and a column a colour, picture i from seed i."""
    wording = WORDINGS["a {colour} {kind}"]
    lone = {scene.shapes[0].kind: scene for scene in scenes_for(wording, 1)}
    prompts = [wording.write(_painted(lone[kind], color)) for kind in KINDS for color in COLORS]
    return contact_sheet(pictures_of(pipe, prompts, **settings), len(COLORS))


def _painted(scene: Scene, color: Color) -> Scene:
    ground = next(name for name in COLORS if name != color)
    return replace(scene, background=ground, shapes=(replace(scene.shapes[0], color=color),))


def as_table(rows: Mapping[str, Mapping[str, float]], *, head: str) -> str:
    """A Markdown table of percentages."""
    names = list(next(iter(rows.values())))
    lines = [f"| {head} | {' | '.join(names)} |", f"| --- |{' --- |' * len(names)}"]
    for label, row in rows.items():
        lines.append(f"| {label} | {' | '.join(f'{row[name]:.0f} %' if name in row else '' for name in names)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Evaluate from the command line."""
    parser = argparse.ArgumentParser(description="Check what a model draws against what it was told.")
    parser.add_argument("--model", default=None)
    parser.add_argument("--each", type=int, default=EACH, help="pictures of each kind for each wording")
    parser.add_argument("--wordings", nargs="*", default=list(WORDINGS), help="these wordings alone")
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--sampler", default=None)
    parser.add_argument("--schedule", default=None)
    parser.add_argument("--guidance", type=float, default=None)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", type=Path, help="the wordings' table in Markdown")
    parser.add_argument("--colors", type=Path, help="a sheet of every colour and kind")
    parser.add_argument("--grid", type=Path, help="a sheet of the first two pictures of each kind, a row a wording")
    parser.add_argument("--failures", type=Path, help="a sheet of pictures that are wrong")
    args = parser.parse_args()
    pipe = sdjax.Pipeline.from_pretrained(args.model)
    settings = {
        "steps": args.steps,
        "sampler": args.sampler,
        "schedule": args.schedule,
        "guidance_scale": args.guidance,
    }
    rows: dict[str, dict[str, float]] = {}
    ceiling: list[bool] = []
    luck: list[bool] = []
    first: list[NDArray[np.uint8]] = []
    wrong: list[NDArray[np.uint8]] = []
    for name in args.wordings:
        wording = WORDINGS[name]
        scenes = scenes_for(wording, args.each)
        drawn = pictures_of(pipe, [wording.write(scene) for scene in scenes], **settings)
        rows[name] = right_shares(drawn, scenes, wording.said)
        print(f"{name:60}", *(f"{kind} {share:3.0f} %" for kind, share in rows[name].items()), flush=True)
        redrawn = through_autoencoder(pipe, [draw(scene, native_size(pipe)) for scene in scenes[: 2 * len(KINDS)]])
        ceiling += _right(redrawn, scenes, wording.said)
        luck += _right(drawn, scenes[1:] + scenes[:1], wording.said)
        first += drawn[: 2 * len(KINDS)]
        wrong += [p for p, holds in zip(drawn, _right(drawn, scenes, wording.said), strict=True) if not holds]
    others = {"through the autoencoder": float(100 * np.mean(ceiling)), "of another scene": float(100 * np.mean(luck))}
    print(", ".join(f"{name} {share:.1f} %" for name, share in others.items()))
    if args.json:
        stated = {"settings": settings, "each": args.each, "percent": rows, **others}
        args.json.write_text(json.dumps(stated, indent=2) + "\n")
    if args.table:
        args.table.write_text(as_table(rows, head="wording"))
    if args.colors:
        every_color_and_kind(pipe, **settings).save(args.colors, optimize=True)
    if args.grid:
        contact_sheet(first, 2 * len(KINDS)).save(args.grid, optimize=True)
    if args.failures and wrong:
        contact_sheet(wrong[:40], 10).save(args.failures, optimize=True)


def _right(pictures: Iterable[NDArray[np.uint8]], scenes: Sequence[Scene], said: Sequence[Statement]) -> list[bool]:
    return [check(picture, scene, said).everything for picture, scene in zip(pictures, scenes, strict=False)]


if __name__ == "__main__":
    main()
