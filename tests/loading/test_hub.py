"""The hub, spoken to over HTTP: a local server answers as much of its API as fetching needs.

Each case runs in a process of its own, since huggingface_hub reads its settings when it is imported.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sdjax.pipeline import BUNDLED_FOLDER

COMMIT, OLDER = "a" * 40, "b" * 40
STEM = "diffusion_pytorch_model"


class Hub:
    """Repositories as folders: `repositories[id]`; `gated` ones need `token`; `asked` lists the files that went out."""

    def __init__(self) -> None:
        self.repositories: dict[str, Path] = {}
        self.gated: set[str] = set()
        self.token = "hf_good"
        self.asked: list[str] = []
        self.broken = 0
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def log_message(self, *_args) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        path = unquote(urlsplit(request.path).path).strip("/")
        parts = path.split("/")
        api = parts[:2] == ["api", "models"]
        owner, name, *rest = parts[2:] if api else parts
        folder = self.repositories.get(f"{owner}/{name}")
        trusted = request.headers.get("authorization") == f"Bearer {self.token}"
        if self.broken:
            self.send(request, self.broken, b"{}", {}, body=body)
        elif folder is None:
            self.send(request, 404 if trusted else 401, b"{}", {"X-Error-Code": "RepoNotFound"}, body=body)
        elif f"{owner}/{name}" in self.gated and not trusted and not (api and not rest):
            code = 401 if "authorization" not in request.headers else 403
            self.send(request, code, b"{}", {"X-Error-Code": "GatedRepo"}, body=body)
        elif rest and rest[1] not in ("main", "v1", COMMIT, OLDER):
            self.send(request, 404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body=body)
        elif api:
            files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
            tree = [
                {"type": "file", "path": file, "size": (folder / file).stat().st_size, "oid": digest(folder / file)}
                for file in files
            ]
            model = {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]}
            self.send(request, 200, json.dumps(tree if rest[:1] == ["tree"] else model).encode(), {}, body=body)
        else:
            file = folder / "/".join(rest[2:])
            if not file.is_file():
                self.send(request, 404, b"", {"X-Error-Code": "EntryNotFound"}, body=body)
                return
            if body:
                self.asked.append("/".join(rest[2:]))
            headers = {"ETag": f'"{digest(file)}"', "X-Repo-Commit": COMMIT}
            self.send(request, 200, file.read_bytes(), headers, body=body)

    @staticmethod
    def send(request, code: int, contents: bytes, headers: dict[str, str], *, body: bool) -> None:
        request.send_response(code)
        for name, value in {"Content-Length": str(len(contents)), **headers}.items():
            request.send_header(name, value)
        request.end_headers()
        if body:
            request.wfile.write(contents)


def digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


LOAD = """
import sys, warnings
import sdjax
from sdjax.loading import cached, load
from sdjax.loading.source import locate
from sdjax.loading.part import Part, find_part, read_part
warnings.simplefilter("ignore", ResourceWarning)
arguments = {arguments!r}
try:
    print("RESULT", {call})
except sdjax.SdjaxError as error:
    print("ERROR", error)
"""


class Client:
    """Runs one call against the hub, in a fresh process with a cache of its own."""

    def __init__(self, hub: Hub, home: Path) -> None:
        self.hub, self.home = hub, home

    def __call__(self, call: str = "locate(**arguments)", *, token: str | None = None, **arguments) -> str:
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        environment |= {"HF_ENDPOINT": self.hub.endpoint, "HF_HOME": str(self.home), "HF_HUB_DISABLE_XET": "1"}
        environment |= {"HF_TOKEN": token} if token else {}
        if "locate" in call:
            arguments = {"variant": None, "revision": None, "local_files_only": False, **arguments}
        code = LOAD.format(arguments=arguments, call=call)
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=240
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith(("RESULT", "ERROR"))]
        assert lines, done.stderr
        self.stderr = done.stderr
        return lines[0]


@pytest.fixture
def hub(tmp_path):
    hub = Hub()
    folder = Path(shutil.copytree(BUNDLED_FOLDER, tmp_path / "repository"))
    for extra in ("README.md", "safety_checker/model.safetensors", f"unet/{STEM}.bin", "v1-5-pruned.safetensors"):
        (folder / extra).parent.mkdir(exist_ok=True)
        (folder / extra).write_bytes(b"not needed")
    hub.repositories["maker/tiny"] = folder
    yield hub
    hub.server.shutdown()


@pytest.fixture
def client(hub, tmp_path):
    return Client(hub, tmp_path / "home")


NEEDED = {
    "card.json",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    f"unet/{STEM}.safetensors",
    "vae/config.json",
    f"vae/{STEM}.safetensors",
}


def test_only_what_is_needed_is_fetched_once_and_then_needs_no_network(hub, client):
    assert client("cached(**arguments)", source="maker/tiny") == "RESULT False"
    loaded = client('load(dtype="float32", **arguments).scheduler.prediction_type', source="maker/tiny")
    assert loaded == "RESULT v_prediction"
    assert set(hub.asked) == NEEDED
    assert len(hub.asked) == len(NEEDED)
    assert "%" in client.stderr  # a progress bar
    hub.asked.clear()
    client(source="maker/tiny")
    assert not hub.asked
    hub.server.shutdown()
    hub.server.server_close()
    assert "snapshots" in client(source="maker/tiny", local_files_only=True)
    assert "snapshots" in client(source="maker/tiny")
    assert "the hub was not reached, so maker/tiny is what its cache has" in client.stderr
    assert client("cached(**arguments)", source="maker/tiny") == "RESULT True"


def add_variant(folder):
    for component, stem in (("unet", STEM), ("vae", STEM), ("text_encoder", "model")):
        shutil.copy(folder / component / f"{stem}.safetensors", folder / component / f"{stem}.fp16.safetensors")


def test_a_variant_is_fetched_instead_of_the_full_weights(hub, client):
    add_variant(hub.repositories["maker/tiny"])
    client(source="maker/tiny", variant="fp16")
    weights = {file for file in hub.asked if file.endswith(".safetensors")}
    assert weights == {
        f"unet/{STEM}.fp16.safetensors",
        f"vae/{STEM}.fp16.safetensors",
        "text_encoder/model.fp16.safetensors",
    }
    assert client("cached(**arguments)", source="maker/tiny", variant="fp16") == "RESULT True"
    assert client("cached(**arguments)", source="maker/tiny") == "RESULT False"


def test_shards_are_fetched_instead_of_a_whole_file(hub, client):
    unet = hub.repositories["maker/tiny"] / "unet"
    (unet / f"{STEM}.safetensors.index.json").write_text("{}")
    for shard in (f"{STEM}-00001-of-00002", f"{STEM}-00002-of-00002", f"{STEM}.fp16-00001-of-00002"):
        (unet / f"{shard}.safetensors").write_text(shard)
    client(source="maker/tiny")
    assert {file for file in hub.asked if file.startswith("unet/")} == {
        "unet/config.json",
        f"unet/{STEM}.safetensors.index.json",
        f"unet/{STEM}-00001-of-00002.safetensors",
        f"unet/{STEM}-00002-of-00002.safetensors",
    }


def test_a_repository_with_a_variant_only_says_how_to_ask_for_it(hub, client):
    folder = hub.repositories["maker/tiny"]
    add_variant(folder)
    (folder / "unet" / f"{STEM}.safetensors").unlink()
    assert 'ask for variant="fp16"' in client(source="maker/tiny")
    assert not hub.asked


def test_a_repository_of_pickles_is_refused_before_anything_is_fetched(hub, client):
    (hub.repositories["maker/tiny"] / "unet" / f"{STEM}.safetensors").unlink()
    error = client(source="maker/tiny")
    assert error.startswith("ERROR maker/tiny/unet has weights in diffusion_pytorch_model.bin only: reading a pickle")
    assert not hub.asked


def test_a_repository_of_single_files_says_what_to_do(hub, client):
    (hub.repositories["maker/tiny"] / "model_index.json").unlink()
    error = client(source="maker/tiny")
    assert "has no model_index.json; it has v1-5-pruned.safetensors: download the one you want" in error


def test_a_wrong_name_is_an_error_that_thinks_of_private_repositories_too(hub, client):
    assert "has no repository maker/tinny, or does not show it to you: check its spelling" in client(
        source="maker/tinny"
    )


def test_an_unknown_revision_is_named_and_a_known_one_is_fetched(hub, client):
    assert "maker/tiny has no revision 'v2'" in client(source="maker/tiny", revision="v2")
    assert COMMIT in client(source="maker/tiny", revision="v1")
    assert "snapshots" in client(source="maker/tiny", revision="v1", local_files_only=True)
    assert "maker/tiny at revision 'v2' is not in the local cache" in client(
        source="maker/tiny", revision="v2", local_files_only=True
    )


def test_a_gated_repository_asks_for_a_login_and_takes_the_token_of_the_environment(hub, client):
    hub.gated.add("maker/tiny")
    for token in (None, "hf_bad"):
        error = client(source="maker/tiny", token=token)
        assert (
            "maker/tiny is gated: accept its conditions on its page at the hub, then log in with `hf auth login`"
            in error
        )
    assert "snapshots" in client(source="maker/tiny", token=hub.token)


def test_without_network_and_cache_the_error_says_what_to_do(hub, client):
    hub.server.shutdown()
    hub.server.server_close()
    for local_files_only, reached in ((True, "no network was to be asked"), (False, "the hub was not reached")):
        error = client(source="maker/tiny", local_files_only=local_files_only)
        assert f"maker/tiny is not in the local cache, and {reached}; without a network, download it elsewhere" in error


def test_a_hub_in_trouble_is_an_error_with_its_answer(hub, client):
    hub.broken = 400
    assert "ERROR the hub answered 400 for maker/tiny" in client(source="maker/tiny")


@pytest.mark.parametrize("name", ["maker/tiny/unet", "tiny", "./maker/tiny", "maker/tiny.safetensors"])
def test_what_is_neither_path_nor_repository_asks_no_network(name, hub, client):
    assert client(source=name) == f"ERROR there is no folder or file {name!r}"
    assert not hub.asked


def test_a_revision_of_a_local_folder_is_refused(client):
    error = client(source=str(BUNDLED_FOLDER), revision="main")
    assert "lies here, and revision='main' names one of a repository on the hub" in error


def test_a_name_that_the_hub_does_not_allow_is_refused_in_a_sentence(hub, client):
    assert "is neither a path nor the id of a repository" in client(source="maker/ti ny")


PART = "find_part(Part(**arguments), 'vae').name, len(read_part(Part(**arguments), 'vae').tensors) > 1"


def test_one_model_is_fetched_alone_from_its_own_repository_and_from_a_pipeline_s(hub, client, tmp_path):
    whole = hub.repositories["maker/tiny"]
    hub.repositories["maker/vae"] = Path(shutil.copytree(whole / "vae", tmp_path / "vae"))
    halves = {name: part.astype(np.float16) for name, part in load_file(whole / "vae" / f"{STEM}.safetensors").items()}
    save_file(halves, tmp_path / "vae" / f"{STEM}.fp16.safetensors")
    call = PART
    assert client(call, source="maker/vae").endswith(" True")
    assert sorted(hub.asked) == ["config.json", f"{STEM}.safetensors"]
    hub.asked.clear()
    assert client(call, source="maker/tiny") == "RESULT vae True"
    assert sorted(hub.asked) == ["vae/config.json", f"vae/{STEM}.safetensors"]
    hub.asked.clear()
    assert client(PART, source="maker/vae", variant="fp16").endswith(" True")
    assert hub.asked == [f"{STEM}.fp16.safetensors"]
    assert client(call, source="maker/vae", local_files_only=True).endswith(" True")
    assert "lacks diffusion_pytorch_model.bf16" in client(call, source="maker/vae", variant="bf16")


def test_a_repository_without_such_a_model_is_named(hub, client):
    call = "find_part(Part(**arguments), 'controlnet')"
    said = client(call, source="maker/tiny")
    assert "maker/tiny has no config.json, nor has a folder 'controlnet' in it; it has v1-5-pruned.safetensors" in said
