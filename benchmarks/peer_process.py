"""Times a new process of diffusers up to its first picture."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.cases import Case, Prepared, Skipped
from sdjax.measuring import peak_bytes_of_children


def prepare(case: Case, *how: str) -> Prepared:
    """Make the case ready; with `first-warm` a run finds what the compiler left of the one before."""
    if case.folder is None:
        raise Skipped("there is no folder to read")
    kept = tempfile.TemporaryDirectory()
    asked = json.dumps({**case.as_dict(), "folder": case.folder})

    def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            cache = kept.name if case.what == "first-warm" else folder
            environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": cache}
            command = [sys.executable, "-m", "benchmarks.peer_picture", asked, str(Path(folder) / "out.png"), *how]
            subprocess.run(command, env=environment, check=True, capture_output=True)

    return Prepared(run, peak_bytes=peak_bytes_of_children, close=kept.cleanup)
