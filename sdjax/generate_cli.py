"""The command `sdjax generate`: from words, and pictures if there are any, to files."""

import json
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from sdjax import arguments, outputs
from sdjax.errors import PromptWarning, RequestError
from sdjax.limits import LAST_SEED
from sdjax.terminal import keep_compiled_programs, show, stages, uncollected

if TYPE_CHECKING:
    from sdjax import Output, Pipeline


class Run(NamedTuple):
    """Pictures of one prompt that are drawn in one call.

    Attributes:
        prompt: of all.
        names: of each picture: those that are tried, in this order.
        seed: of the first.
    """

    prompt: str
    names: Sequence[Iterator[Path] | list[Path]]
    seed: int


def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help="What to draw; several are drawn in turn.")] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option("--prompts", metavar="FILE", help="A file of prompts, one a line; lines with # are comments."),
    ] = None,
    negative: Annotated[str | None, typer.Option(help="What to stay away from.")] = None,
    output: Annotated[
        str,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE|FOLDER",
            help="A .png, .jpg or .webp file, or a folder. Several pictures are numbered, and nothing is overwritten.",
        ),
    ] = "out.png",
    skip_existing: Annotated[
        bool,
        typer.Option("--skip-existing", help="Go on after an interruption: draw only the pictures that are missing."),
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="A name of `sdjax models`, a hub id, a folder or a .safetensors file.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the sampler.")] = None,
    guidance: Annotated[
        float | None, typer.Option(help="How closely to follow the prompt; up to 1: not at all.")
    ] = None,
    rescale: Annotated[float, typer.Option(help="0 to 1: how much of the contrast that guidance adds to undo.")] = 0.0,
    sampler: Annotated[str | None, typer.Option(help="ddim, euler, dpmpp_2m, unipc, ...")] = None,
    schedule: Annotated[str | None, typer.Option(help="karras, exponential, beta or ays.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the first picture; the next ones follow.")] = None,
    size: Annotated[str | None, typer.Option(help="In pixels: 512, or 512x768 (width x height).")] = None,
    num: Annotated[int, typer.Option(help="Pictures of each prompt.")] = 1,
    image: Annotated[Path | None, typer.Option(help="A picture to start from.")] = None,
    strength: Annotated[float, typer.Option(help="How much of it to paint anew, 0 to 1.")] = 0.8,
    mask: Annotated[Path | None, typer.Option(help="A picture, white where --image is to be repainted.")] = None,
    feather: Annotated[float, typer.Option(help="Pixels over which the repainted part fades in.")] = 0.0,
    mask_padding: Annotated[
        int | None, typer.Option(help="Work on the masked part alone, with this many pixels around it.")
    ] = None,
    lora: Annotated[
        list[str] | None, typer.Option(metavar="FILE[:WEIGHT]", help="An adapter; may be given several times.")
    ] = None,
    lora_dir: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where <lora:name:0.8> in a prompt is looked for.")
    ] = None,
    control: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL[@VARIANT]:IMAGE[:SCALE]",
            help="A ControlNet (a folder, file or hub id) and what it is to see.",
        ),
    ] = None,
    embedding: Annotated[
        list[str] | None, typer.Option(metavar="FILE[:WORD]", help="A learned word (textual inversion).")
    ] = None,
    clip_skip: Annotated[int | None, typer.Option(help="Layers of the text encoder to leave out.")] = None,
    chunk: Annotated[bool, typer.Option("--chunk", help="Read long prompts in chunks, uncut.")] = False,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    weights: Annotated[str | None, typer.Option(help="int8: keep them in a quarter of the memory.")] = None,
    vae: Annotated[
        str | None, typer.Option(metavar="MODEL[@VARIANT]", help="Another autoencoder: a folder, file or hub id.")
    ] = None,
    variant: Annotated[str | None, typer.Option(help="Of the weight files, such as fp16.")] = None,
    revision: Annotated[str | None, typer.Option(help="A branch, tag or commit of a hub repository.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Ask no network.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object a picture instead of its path.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Draw pictures from words and print the path of each."""
    wanted = [*(prompts or []), *(_prompts_of(prompts_file) if prompts_file else [])]
    if not wanted:
        raise RequestError('there is no prompt: give one, such as "a red circle on a blue background"')
    if num < 1:
        raise RequestError("--num must be at least 1")
    width, height = arguments.size_if_given(size)
    arguments.check_model(model)
    place = outputs.place(output, len(wanted) * num)
    from sdjax.images import open_picture

    with stages(quiet) as stage, ExitStack() as up_to_the_first:
        up_to_the_first.enter_context(uncollected())
        stage("loading")
        settings = {
            "steps": steps,
            "guidance_scale": guidance,
            "guidance_rescale": rescale,
            "sampler": sampler,
            "schedule": schedule,
            "width": width,
            "height": height,
            "image": None if image is None else open_picture(image),
            "strength": strength,
            "mask": None if mask is None else open_picture(mask),
            "feather": feather,
            "padding_mask_crop": mask_padding,
            "loras": [arguments.with_number(given, 1.0) for given in lora or ()],
            "lora_dir": lora_dir,
            "control": [_control(given, offline) for given in control or ()],
            "embeddings": [_with_word(given) for given in embedding or ()],
            "clip_skip": clip_skip,
            "long_prompts": "chunk" if chunk else "truncate",
        }
        keep_compiled_programs()
        from sdjax import Pipeline

        pipe = Pipeline.from_pretrained(
            model,
            dtype=dtype,
            weights=weights,
            variant=variant,
            revision=revision,
            local_files_only=offline,
            vae=None if vae is None else _part(vae, offline),
        )
        # Everything is checked before the first picture is drawn; each is on disk before the next one is begun.
        described, first = _resolved(pipe, wanted, negative, settings, seed)
        warnings.simplefilter("ignore", PromptWarning)  # each is shown already
        if skip_existing:
            runs = _missing(place, wanted, negative, described, num, seed, first)
        else:
            free = place.free()
            runs = [Run(prompt, [free] * num, first + i * num) for i, prompt in enumerate(wanted)]
        stage("compiling")
        for prompt, names, begin in runs:
            began = time.monotonic()
            asked = {**settings, "seed": begin % (LAST_SEED + 1), "num_images": len(names)}
            out = pipe(prompt, negative, **asked, progress=stage.steps)  # type: ignore[arg-type]
            seconds = time.monotonic() - began
            for path, told in _written(out, names, place.kind, prompt, negative):
                if as_json:
                    entry = {"path": str(path), "prompt": prompt, **told, "seconds": round(seconds, 3)}
                    print(json.dumps(entry), flush=True)
                else:
                    print(path, flush=True)
            if not as_json:
                show(out.images)
            up_to_the_first.close()


def _prompts_of(file: Path) -> list[str]:
    """The prompts in a file, one a line. Empty lines and those with # in front are left out; `\\#` is a # to draw."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").split("\n")]
    except UnicodeDecodeError as error:
        raise RequestError(f"{file} is not a text file in UTF-8") from error
    prompts = [
        line.removeprefix("\\") if line.startswith("\\#") else line for line in lines if line[:1] not in ("", "#")
    ]
    if not prompts:
        raise RequestError(f"{file} holds no prompts: write one a line")
    return prompts


def _resolved(
    pipe: "Pipeline", prompts: Sequence[str], negative: str | None, settings: Mapping[str, Any], seed: int | None
) -> tuple[list[dict[str, Any]], int]:
    """Check what is asked for, warn of what is cut or ignored, and give each prompt's settings and the first seed."""
    described: list[dict[str, Any]] = []
    messages: list[str] = []
    seeds: list[int] = []
    for prompt in prompts:
        request = pipe.resolve(prompt, negative, **{**settings, "seed": seed})
        described.append({"model": pipe.name, **request.settings})
        messages += request.warnings
        seeds += request.seeds
    for message in dict.fromkeys(messages):
        warnings.warn(message, PromptWarning, stacklevel=2)
    return described, seeds[0]


def _missing(
    place: outputs.Place,
    prompts: Sequence[str],
    negative: str | None,
    described: Sequence[Mapping[str, Any]],
    num: int,
    seed: int | None,
    first: int,
) -> list[Run]:
    """The pictures that an earlier, interrupted command did not come to.

    Args:
        place: where the pictures are; `num` of each of the prompts.
        prompts: of the earlier command, and of this one.
        negative: likewise.
        described: the settings of each prompt's pictures.
        num: pictures of each prompt.
        seed: of the first picture, where it is given; else it follows from a picture that is there.
        first: the seed where none is there.

    Raises:
        RequestError: a picture that is there was drawn from something else.
    """
    names = place.fixed(len(prompts) * num)
    there = {i: _parameters(path) for i, path in enumerate(names) if path.exists()}
    if there:
        found, parameters = next(iter(there.items()))
        if seed is None and isinstance(parameters.get("seed"), int):
            first = parameters["seed"] - found
        for i, parameters in there.items():
            _check_same(names[i], parameters, prompts[i // num], negative, described[i // num], first + i)
        print(f"sdjax: {len(there)} of {len(names)} pictures are there already", file=sys.stderr)
    runs = []
    for i, prompt in enumerate(prompts):
        missing = [index for index in range(i * num, (i + 1) * num) if index not in there]
        # Indices that follow each other without a gap are one call.
        for _, group in groupby(enumerate(missing), lambda pair: pair[1] - pair[0]):
            indices = [index for _, index in group]
            runs.append(Run(prompt, [[names[index]] for index in indices], first + indices[0]))
    return runs


def _parameters(path: Path) -> dict[str, Any]:
    from sdjax import metadata

    try:
        return metadata.read(path)
    except metadata.MetadataError as error:
        raise RequestError(f"--skip-existing: {error}; give another --output") from error


def _check_same(
    path: Path,
    found: Mapping[str, Any],
    prompt: str,
    negative: str | None,
    described: Mapping[str, Any],
    seed: int,
) -> None:
    from sdjax import metadata

    # What starts from a picture may have that picture's size.
    size = f"{described['width']}x{described['height']}" if described["strength"] is None else found.get("size")
    settings = {**described, "seed": seed % (LAST_SEED + 1), "size": size}
    wanted = metadata.from_text(metadata.to_text(prompt, negative, settings))
    if others := [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]:
        raise RequestError(
            f"--skip-existing: {path} was drawn with another {', '.join(others)}; give the same, or another --output"
        )


def _written(
    out: "Output", names: Sequence[Iterator[Path] | list[Path]], kind: str, prompt: str, negative: str | None
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Write each picture and give its path, and the settings it was made with."""
    from sdjax import metadata

    for tried, image, seed in zip(names, out.images, out.seeds, strict=True):
        settings = {**out.settings, "seed": seed}
        content = partial(metadata.save, image, kind=kind, prompt=prompt, negative_prompt=negative, settings=settings)
        yield outputs.write(tried, content), {"negative_prompt": negative, **settings}


def _with_word(given: str) -> Any:
    name, colon, word = given.rpartition(":")
    return (name, word) if colon and not Path(given).exists() else given


def _part(given: str, offline: bool) -> Any:
    from sdjax import Part

    source, variant = arguments.with_variant(given)
    return Part(source, variant, local_files_only=offline)


def _control(given: str, offline: bool) -> tuple[Any, Any, float]:
    from sdjax.images import open_picture

    rest, scale = arguments.with_number(given, 1.0)
    folder, colon, picture = rest.rpartition(":")
    if not colon:
        raise RequestError(f"--control must be MODEL:IMAGE or MODEL:IMAGE:SCALE, not {given!r}")
    return _part(folder, offline), open_picture(Path(picture)), scale
