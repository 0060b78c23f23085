"""A checkpoint's folder for the cases that read one: written once by diffusers, so that all sides read the same files.

`python -m benchmarks.folders MODEL DTYPE FOLDER` is the process that writes it; its weights leave memory with it.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.cases import FROM_FOLDER, Case
from benchmarks.models import BUNDLED, MODELS


def with_folder(case: Case, scratch: Path) -> Case:
    """Give a case the folder that it reads: the bundled model's own, or one of random weights under `scratch`.

    Where diffusers is absent, so that none can be written, the case stays without, and its sides skip it.
    """
    if case.what not in FROM_FOLDER:
        return case
    if case.model == "bundled":
        return replace(case, folder=str(BUNDLED))
    folder = scratch / f"{case.model}-{case.arithmetic}"
    if not folder.exists():
        command = [sys.executable, "-m", "benchmarks.folders", case.model, case.arithmetic, str(folder)]
        if subprocess.run(command, check=False, capture_output=True).returncode:
            return case
    return replace(case, folder=str(folder))


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a folder."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.folders", description="Write random weights.")
    parser.add_argument("model", choices=[model for model in MODELS if model != "bundled"])
    parser.add_argument("dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("folder", type=Path)
    options = parser.parse_args(arguments)
    # Here, for what reads a folder needs neither PyTorch nor diffusers.
    from benchmarks.sides.diffusers_eager import pipeline

    pipeline(Case("load", options.model, dtype=options.dtype), with_tokenizers=True).save_pretrained(options.folder)


if __name__ == "__main__":
    main()
