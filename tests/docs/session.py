"""A reader at work: runs blocks one after the other in a fresh clone, in one shell and one Python."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
from pathlib import Path

import pytest

from sdjax.errors import PromptWarning
from tests.docs import standins
from tests.docs.blocks import ROOT, Block

PORT = "8600"
"""That the pages have."""
SECONDS = 900
"""Until a block that hangs is given up."""


def clone(folder: Path) -> None:
    """Copy what a clone of the repository would have, as it stands here."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


class Session:
    """Where a page's blocks run.

    Args:
        folder: empty; becomes the clone.
        hub: a filled cache of the hub.
        page: for messages.
    """

    def __init__(self, folder: Path, hub: Path, page: Path) -> None:
        self.page = page
        self.folder = folder / "clone"
        clone(self.folder)
        # The README installs and activates an environment; whoever reads another page has done so.
        tools = folder / "tools"
        tools.mkdir()
        for name in ("python3",) if page == ROOT / "README.md" else ("python3", "python", "sdjax"):
            module = "-m sdjax " if name == "sdjax" else ""
            (tools / name).write_text(f'#!/bin/sh\nexec {sys.executable} {module}"$@"\n')
            (tools / name).chmod(0o755)
        self._state = folder / "state"
        self.names: dict[str, object] = {"__name__": "__main__"}
        self._servers: list[subprocess.Popen] = []
        self._port = _free_port()
        packages = next(path for path in sys.path if path.endswith("site-packages"))
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("VIRTUAL_ENV", "SDJAX_"))},
            "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
            "HF_HOME": str(hub),
            "HF_HUB_OFFLINE": "1",
            "SDJAX_SERVER": f"http://127.0.0.1:{self._port}",
            # `pip install .` builds and installs this package; the others are those of the tests' environment.
            "PIP_NO_DEPS": "1",
            "PIP_NO_BUILD_ISOLATION": "0",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PYTHONPATH": packages,
        }

    def run(self, block: Block) -> None:
        """Run a block, and fail as it fails."""
        if block.mark == "files":
            for name in block.value.split():
                if not (self.folder / name).exists():
                    standins.FILES[name](self.folder / name)
        code = block.code.replace(PORT, self._port)
        where = f"{self.page.relative_to(ROOT)}, line {block.line}"
        if block.language == "python":
            self._python(code, where, block.line)
        elif block.mark == "server":
            self._serve(code, where)
        else:
            self._shell(code, where)

    def close(self) -> None:
        """End the page's servers."""
        for server in self._servers:
            os.killpg(server.pid, signal.SIGTERM)
        for server in self._servers:
            server.wait(120)

    def _python(self, code: str, where: str, line: int) -> None:
        # The lines are those of the page, so that a traceback shows where.
        compiled = compile("\n" * (line - 1) + code, str(self.page), "exec")
        before = Path.cwd()
        os.chdir(self.folder)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "the hub was not reached")
                warnings.simplefilter("error", PromptWarning)  # an example that lacks something is a bad example
                exec(compiled, self.names)
        except Exception as error:
            pytest.fail(f"{where}: {type(error).__name__}: {error}", pytrace=True)
        finally:
            os.chdir(before)

    def _script(self, code: str) -> list[str]:
        state = self._state
        return ["bash", "-euo", "pipefail", "-c", f"[ -f {state} ] && . {state}\n{code}\nexport -p > {state}\n"]

    def _shell(self, code: str, where: str) -> None:
        done = subprocess.run(
            self._script(code), cwd=self.folder, env=self._environment, capture_output=True, text=True,
            timeout=SECONDS, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{where}:\n{code}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr, f"{where}:\n{done.stderr}"

    def _serve(self, code: str, where: str) -> None:
        log = self.folder.parent / f"server-{len(self._servers)}.log"
        environment = {**self._environment, "SDJAX_DATA_DIR": str(self.folder.parent / "data")}
        with log.open("wb") as file:
            server = subprocess.Popen(
                self._script(code), cwd=self.folder, env=environment, stdout=file, stderr=file, start_new_session=True
            )
        self._servers.append(server)
        until = time.monotonic() + SECONDS
        while not _is_ready(f"http://127.0.0.1:{self._port}/ready"):
            assert server.poll() is None, f"{where}: the server ended\n{log.read_text()}"
            assert time.monotonic() < until, f"{where}: the server is not ready\n{log.read_text()}"
            time.sleep(0.2)


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False
