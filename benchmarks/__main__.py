"""Command line of the benchmarks."""

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.cases import WHAT, Case
from benchmarks.folders import with_folder
from benchmarks.models import MODELS
from benchmarks.sides import SIDES
from benchmarks.timing import measure

PACKAGES = ("sdjax", "jax", "jaxlib", "flax", "torch", "diffusers", "openvino")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 1 where `compare` finds a case slower."""
    options = _parser().parse_args(arguments)
    if options.command == "compare":
        lines, is_good = report.compare(options.before, options.after, tolerance=options.tolerance)
        print("\n".join(lines))
        return 0 if is_good else 1
    results = []
    pythons = dict(options.python)
    with tempfile.TemporaryDirectory() as scratch:
        for model in options.model:
            for batch in options.batch:
                for dtype in options.dtype:
                    case = Case(options.command, model, batch, dtype, options.device, options.steps)
                    case = with_folder(case, Path(scratch))
                    sides = ["sdjax", *options.peers]
                    results.append(measure(case, sides, repeats=options.repeats, pythons=pythons))
                    print(report.line(results[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "results": results}, indent=1), encoding="utf-8")
    if options.plot:
        report.plot(results, options.plot)
    return 0


def machine() -> dict[str, Any]:
    """Where results come from: processor, cores and package versions."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    information = Path("/proc/cpuinfo")
    names = information.read_text(encoding="utf-8").splitlines() if information.exists() else []
    processor = next((name.split(":")[1].strip() for name in names if name.startswith("model name")), "")
    return {
        "processor": processor or platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": versions,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Time sdjax beside its peers.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="CASE")
    for what, described in WHAT.items():
        case = commands.add_parser(what, help=described, description=described)
        case.add_argument("--model", nargs="+", choices=MODELS, default=["bundled"])
        case.add_argument("--batch", nargs="+", type=_count, default=[1], help="pictures at once")
        case.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16", "float16", "int8"), default=["float32"])
        case.add_argument("--device", choices=("cpu", "gpu", "tpu"), default="cpu")
        case.add_argument("--steps", type=_count, help="of a whole picture; the model's own number without it")
        case.add_argument("--peers", nargs="*", choices=[side for side in SIDES if side != "sdjax"], default=[])
        case.add_argument(
            "--python",
            type=_python,
            action="append",
            default=[],
            metavar="SIDE=PYTHON",
            help="the interpreter of a peer that has an environment of its own; may be given several times",
        )
        case.add_argument("--repeats", type=_count, default=5)
        case.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
        case.add_argument("--plot", type=Path, metavar="FILE", help="draw the relative speeds (PNG, SVG or PDF)")
    comparison = commands.add_parser("compare", help="two JSON files; fails where a case became slower")
    comparison.add_argument("before", type=Path)
    comparison.add_argument("after", type=Path)
    comparison.add_argument("--tolerance", type=float, default=1.1, help="factor that is still fine (default 1.1)")
    return parser


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return count


def _python(text: str) -> tuple[str, str]:
    side, separator, python = text.partition("=")
    if not separator or side not in SIDES:
        raise argparse.ArgumentTypeError(f"must be SIDE=PYTHON with a side of {', '.join(SIDES)}, not {text!r}")
    if shutil.which(python) is None:
        raise argparse.ArgumentTypeError(f"there is no program {python!r}")
    return side, python


if __name__ == "__main__":
    sys.exit(main())
