"""Everything that is to be known of a GPU, in one call of under ten minutes and without a network.

`python -m benchmarks.gpu --json gpu.json`: what matters most comes first, every part has a process group of its own,
and what there is no time left for is skipped with a word. `--device cpu --model bundled --steps 2` shows that it works.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.__main__ import machine
from benchmarks.models import MODELS

SECONDS = 570.0
PICTURES = {"sd-v1-5": 50, "sd-xl": 30, "sdxl-turbo": 4}
"""Steps of the pictures that are compared."""
GRACE = 10.0


@dataclass(frozen=True)
class Part:
    """A command that writes JSON to the file which is put behind it.

    Attributes:
        name: for the report.
        module: what `python -m` runs.
        arguments: its own.
        environment: what it needs in its environment.
    """

    name: str
    module: str
    arguments: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)


def parts(device: str, models: Sequence[str], peers: Sequence[str], steps: int | None, repeats: int) -> Iterator[Part]:
    """All parts, the most important first."""
    dtype = "float32" if device == "cpu" else "bfloat16"
    common = ("--device", device, "--dtype", dtype, "--repeats", str(repeats))
    against = ("--peers", *peers) if peers else ()

    def case(name: str, *more: str, environment: dict[str, str] | None = None) -> Part:
        return Part(name, "benchmarks", (*more, *common), environment or {})

    yield Part("attention", "benchmarks.attention", ("--device", device))
    for model in models:
        count = steps or PICTURES.get(model, MODELS[model].steps)
        yield case(f"picture {model}", "picture", "--model", model, "--steps", str(count), *against)
    largest = "sd-xl" if "sd-xl" in models else models[-1]
    yield case(f"unet {largest}, batch 8", "unet", "--model", largest, "--batch", "8")
    for model in models:
        yield case(f"unet {model}", "unet", "--model", model)
        yield case(f"vae-decode {model}", "vae-decode", "--model", model)
    first = models[0]
    without = {"XLA_FLAGS": "--xla_gpu_triton_gemm_any=false --xla_gpu_enable_latency_hiding_scheduler=false"}
    with_ours = {"XLA_FLAGS": "--xla_gpu_triton_gemm_any=true --xla_gpu_enable_latency_hiding_scheduler=true"}
    yield case(f"unet {first}, without flags", "unet", "--model", first, environment=without)
    yield case(f"unet {first}, with flags", "unet", "--model", first, environment=with_ours)
    int8 = ("unet", "--model", first, "--device", device, "--dtype", "int8", "--repeats", str(repeats))
    yield Part(f"unet {first}, int8", "benchmarks", int8)


def run(part: Part, seconds: float, folder: Path) -> dict[str, Any]:
    """Run a part, which prints its lines, for at most so long: {"seconds", "results"}, or {"skipped": why}."""
    if seconds <= 0:
        return {"skipped": "no time left"}
    written = folder / "part.json"
    written.unlink(missing_ok=True)
    # Both sides of a case hold memory of one card at a time: neither may take it all at once.
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", **part.environment}
    began = time.monotonic()
    command = [sys.executable, "-m", part.module, *part.arguments, "--json", str(written)]
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        end(process)
        return {"skipped": f"it took longer than the {seconds:.0f} s that were left"}
    except BaseException:
        end(process)
        raise
    took = time.monotonic() - began
    if code:
        return {"skipped": f"it ended with {code}", "seconds": took}
    return {"seconds": took, "results": json.loads(written.read_text(encoding="utf-8"))["results"]}


def end(process: "subprocess.Popen[bytes]") -> None:
    """End a process that leads a group, and all that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(GRACE)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all parts; the exit status is 1 where none could be measured."""
    options = _parser().parse_args(arguments)
    deadline = time.monotonic() + options.seconds
    told: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for part in parts(options.device, options.model, options.peers, options.steps, options.repeats):
            print(f"# {part.name}", flush=True)
            told[part.name] = run(part, deadline - time.monotonic(), Path(folder))
            if "skipped" in told[part.name]:
                print(f"{part.name}: skipped ({told[part.name]['skipped']})", flush=True)
            if options.json:  # after every part: whoever ends the script keeps what it found
                about = {"machine": machine(), "device": options.device, "parts": told}
                options.json.write_text(json.dumps(about, indent=1), encoding="utf-8")
    return 0 if any("results" in part for part in told.values()) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--device", choices=("cpu", "gpu", "tpu"), default="gpu")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(PICTURES))
    parser.add_argument("--peers", nargs="*", default=["diffusers-compile"])
    parser.add_argument("--steps", type=int, help="of each picture; 50, 30 and 4 without it")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything (default 570)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="written after every part")
    return parser


if __name__ == "__main__":
    sys.exit(main())
