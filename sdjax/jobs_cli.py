"""The commands `sdjax jobs`: what a server draws, from another terminal or another machine."""

import json
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdjax import arguments, outputs
from sdjax.errors import RequestError, SdjaxError
from sdjax.terminal import print_table, printable, shortened, stages

if TYPE_CHECKING:
    from sdjax.jobs_client import JobClient

Server = Annotated[str, typer.Option(metavar="URL", envvar="SDJAX_SERVER", help="Where the server is.")]
Key = Annotated[str | None, typer.Option(envvar="SDJAX_API_KEY", help="Where the server asks for one.")]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="Its id.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]

LOCAL = "http://127.0.0.1:8600"
EXTENSIONS = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
UNPRINTED = ("image", "images")
"""Of an event's data: pictures are for `get`."""

app = typer.Typer(help="Submit jobs to a server, watch, list, cancel and fetch them.", no_args_is_help=True)


@app.command()
def submit(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    negative: Annotated[str | None, typer.Option(help="What to stay away from.")] = None,
    image: Annotated[Path | None, typer.Option(help="A picture to start from.")] = None,
    mask: Annotated[Path | None, typer.Option(help="A picture, white where --image is to be repainted.")] = None,
    strength: Annotated[float | None, typer.Option(help="How much of --image to paint anew, 0 to 1.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the sampler.")] = None,
    guidance: Annotated[float | None, typer.Option(help="How closely to follow the prompt.")] = None,
    sampler: Annotated[str | None, typer.Option(help="ddim, euler, dpmpp_2m, unipc, ...")] = None,
    schedule: Annotated[str | None, typer.Option(help="karras, exponential, beta or ays.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the first picture; the next ones follow.")] = None,
    size: Annotated[str | None, typer.Option(help="In pixels: 512, or 512x768 (width x height).")] = None,
    num: Annotated[int | None, typer.Option(help="How many pictures.")] = None,
    lora: Annotated[
        list[str] | None, typer.Option(metavar="NAME[:WEIGHT]", help="An adapter in the server's folder; repeatable.")
    ] = None,
    response: Annotated[str | None, typer.Option(metavar="png|jpeg|webp", help="The pictures' format.")] = None,
    preview_every: Annotated[int | None, typer.Option(help="Steps between previews, for those who show them.")] = None,
    model: Annotated[str | None, typer.Option(help="The model that the server must have.")] = None,
    hive_id: Annotated[str | None, typer.Option(help="Repeated by the job.")] = None,
    worker_id: Annotated[str | None, typer.Option(help="Repeated by the job.")] = None,
    is_watched: Annotated[bool, typer.Option("--watch", help="Wait for its end.")] = False,
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", metavar="FILE|FOLDER", help="Wait for its end, and write the pictures here; see `get`."
        ),
    ] = None,
    server: Server = LOCAL,
    api_key: Key = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Quiet = False,
) -> None:
    """Submit a job and print its id."""
    width, height = arguments.size_if_given(size)
    if output is not None:
        place = outputs.place(output, num or 1, suffix=EXTENSIONS.get(response or "", ".png"))
        response = response or (place.kind if place.kind != "png" else None)
        _check_kind(place, response or "png")
    fields = {
        **_operation(image, mask, strength, size),
        "prompt": prompt,
        "negative_prompt": negative,
        "steps": steps,
        "guidance_scale": guidance,
        "sampler": sampler,
        "schedule": schedule,
        "seed": seed,
        "width": width,
        "height": height,
        "num_images": num,
        "loras": [
            dict(zip(("path", "strength"), arguments.with_number(each, 1.0), strict=True)) for each in lora or ()
        ],
        "response": response,
        "preview_every": preview_every,
        "model": model,
        "hive_id": hive_id,
        "worker_id": worker_id,
    }
    with _connected(server, api_key) as client:
        accepted = client.submit({name: value for name, value in fields.items() if value is not None})
        print(json.dumps(accepted) if as_json else accepted["job_id"], flush=True)
        _warn(client.job(accepted["job_id"]))
        if is_watched or output is not None:
            _watched(client, accepted["job_id"], as_json=as_json, quiet=quiet)
        if output is not None:
            _save(client, client.job(accepted["job_id"]), output)


@app.command(name="ls")
def list_jobs(
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="How many at most.")] = 20,
    server: Server = LOCAL,
    api_key: Key = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object a job.")] = False,
) -> None:
    """List jobs, newest first."""
    with _connected(server, api_key) as client:
        jobs = list(client.jobs(limit))
    if as_json:
        for job in jobs:
            print(json.dumps(job, ensure_ascii=False))
        return
    rows = [("job", "state", "age", "size", "seed", "prompt")]
    for job in jobs:
        request = job["request"]
        position = f" {job['position']}" if job["position"] else ""
        size = f"{request['width']}x{request['height']}"
        prompt = printable(" ".join(request["prompt"].split()))
        rows.append(
            (
                job["job_id"],
                job["state"] + position,
                _age(job["created"]),
                size,
                str(request["seed"]),
                shortened(prompt),
            )
        )
    print_table(rows)


@app.command()
def watch(
    job_id: JobId,
    server: Server = LOCAL,
    api_key: Key = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object an event.")] = False,
    quiet: Quiet = False,
) -> None:
    """Follow a job to its end and print where its pictures are."""
    with _connected(server, api_key) as client:
        _watched(client, job_id, as_json=as_json, quiet=quiet)
        if not as_json:
            job = client.job(job_id)
            _warn(job)
            for number in range(len(job["images"])):
                print(client.image_url(job_id, number))


@app.command()
def cancel(
    job_ids: Annotated[list[str], typer.Argument(metavar="JOB...", help="Their ids.")],
    server: Server = LOCAL,
    api_key: Key = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object a job.")] = False,
) -> None:
    """Cancel jobs and print their ids."""
    with _connected(server, api_key) as client:
        for job_id in job_ids:
            job = client.cancel(job_id)
            print(json.dumps(job, ensure_ascii=False) if as_json else job_id)


@app.command()
def get(
    job_id: JobId,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE|FOLDER",
            help="Write its pictures here. Several are numbered, and nothing is overwritten.",
        ),
    ] = None,
    server: Server = LOCAL,
    api_key: Key = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False,
) -> None:
    """Print what is known of a job, or write its pictures and print their paths."""
    if output is not None:
        outputs.place(output, 1)
    with _connected(server, api_key) as client:
        job = client.job(job_id)
        if output is not None:
            _save(client, job, output)
        elif as_json:
            print(json.dumps(job, ensure_ascii=False))
        else:
            for name, value in {**job["request"], **job}.items():
                if value not in (None, [], {}) and name != "request":
                    print(
                        f"{name}: {json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value}"
                    )


def _connected(server: str, key: str | None) -> "JobClient":
    try:
        from sdjax.jobs_client import JobClient
    except ModuleNotFoundError as error:
        raise SdjaxError(f"the client needs {error.name}: pip install 'sdjax[client]'") from error
    return JobClient(server, key or None)


def _operation(image: Path | None, mask: Path | None, strength: float | None, size: str | None) -> dict[str, Any]:
    """The operation that the given pictures make it, and its own fields."""
    if image is None:
        for name, value in (("--mask", mask), ("--strength", strength)):
            if value is not None:
                raise RequestError(f"{name} needs a picture to start from: give --image too")
        return {"operation": "image_generation"}
    if size is not None:
        raise RequestError("--size: a job that starts from a picture has that picture's size")
    from sdjax.jobs_client import encoded

    if mask is None:
        return {"operation": "image_transform", "input_image": encoded(image), "strength": strength}
    given = {"init_image": encoded(image), "mask_image": encoded(mask)}
    return {"operation": "image_inpaint", **given, "strength": strength}


def _watched(client: "JobClient", job_id: str, *, as_json: bool, quiet: bool) -> None:
    """Follow a job to its end.

    Raises:
        SdjaxError: it ended without a picture.
    """
    end: dict[str, Any] = {}
    try:
        with stages(quiet or as_json) as stage:
            for event in client.story(job_id):
                if as_json:
                    print(json.dumps({name: event[name] for name in event if name not in UNPRINTED}), flush=True)
                if event["type"] == "queued":
                    stage("waiting" if event["position"] == 1 else f"waiting, number {event['position']}")
                elif event["type"] == "progress":
                    stage.steps(event["step"], event["total"])
                end = event
    except KeyboardInterrupt:
        print(f"sdjax: the job goes on; to stop it: sdjax jobs cancel {job_id}", file=sys.stderr)
        raise
    if end["type"] != "complete":
        raise SdjaxError(f"the job failed: {end['message']}" if end["type"] == "error" else "the job was cancelled")


def _save(client: "JobClient", job: dict[str, Any], output: str) -> None:
    """Write a job's pictures and print their paths."""
    if not job["images"]:
        raise SdjaxError(f"the job has no pictures: it is {job['state']}")
    kind = job["request"]["response"]
    place = outputs.place(output, len(job["images"]), stem=job["job_id"], suffix=EXTENSIONS[kind])
    _check_kind(place, kind)
    free = place.free()
    for number in range(len(job["images"])):
        content = client.image(job["job_id"], number)
        print(outputs.write(free, lambda file, content=content: file.write(content)), flush=True)  # type: ignore[misc]


def _warn(job: dict[str, Any]) -> None:
    """Print what of the request was cut, replaced or ignored."""
    for warning in job.get("warnings", ()):
        warnings.warn(warning, stacklevel=1)


def _check_kind(place: outputs.Place, kind: str) -> None:
    if kind in EXTENSIONS and place.kind != kind:
        raise RequestError(
            f"--output: a name that ends in {place.suffix} is for a {place.kind}, and the job's pictures are {kind}: "
            f"end it in {EXTENSIONS[kind]}"
        )


def _age(created: float) -> str:
    seconds = max(0, int(time.time() - created))
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"
