"""`sdjax bench`: times of the parts of drawing, as a table and as JSON."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sdjax import bench_cli, cli
from sdjax.pipeline import BUNDLED_FOLDER

ROOT = str(Path(cli.__file__).parents[1])


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "sdjax", "bench", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": ROOT},
        capture_output=True,
        text=True,
        check=False,
    )


def call(capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["sdjax", "bench", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    said = capsys.readouterr()
    return stop.value.code, said.out, said.err


def test_named_cases_are_timed_and_told_as_json():
    done = run("vae-decode", "load", "text-encoder", "--repeats", 2, "--batch", 2, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert (told["model"], told["dtype"], told["batch"]) == ("tiny", "float32", 2)
    results = {row["case"]: row for row in told["results"]}
    assert list(results) == ["load", "text-encoder", "vae-decode"]
    decoded = results["vae-decode"]
    assert len(decoded["all_seconds"]) == 2
    assert decoded["pictures_per_second"] == pytest.approx(2 / decoded["seconds"])
    assert decoded["compile_seconds"] > decoded["seconds"] > 0
    assert all(row["peak_host_bytes"] > 100 * 2**20 for row in told["results"])


def test_a_whole_picture_of_a_folder_becomes_a_row_of_the_table(capsys, monkeypatch):
    code, out, err = call(
        capsys, monkeypatch, "picture", "text-encoder", "--model", BUNDLED_FOLDER, "--steps", 2, "--repeats", 1
    )
    assert (code, err) == (0, "")
    title, head, text, picture = out.strip().splitlines()
    assert title.startswith(f"{BUNDLED_FOLDER}, float32, batch 1, on cpu")
    assert head.split()[0] == "case"
    assert text.startswith("text-encoder ")
    assert picture.startswith("picture ")
    assert "GiB" in picture


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["unets"], 2, "there is no case 'unets': the cases are load, text-encoder, unet"),
        (["unet", "--model", "sd-v1-4"], 2, "did you mean 'sd-v1-5'?"),
        (["unet", "--size", "big"], 2, "--size: must be like 512 or 512x768"),
        (["unet", "--size", "63"], 2, "width must be"),
        (["unet", "--dtype", "int8"], 2, "dtype must be float32, bfloat16, float16 or None, not 'int8'"),
        (["unet", "--repeats", "0"], 2, "Invalid value for '--repeats'"),
        (["load", "--model", "./nowhere/at-all"], 1, "nowhere"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(capsys, monkeypatch, arguments, code, said):
    ended, out, err = call(capsys, monkeypatch, *arguments)
    assert (ended, out) == (code, "")
    assert err.count("\n") == 1
    assert said in err


def test_every_case_is_described():
    assert set(bench_cli.PARTS) < set(bench_cli.CASES)


def test_a_peak_that_is_forgotten_does_not_come_back():
    # in a process of its own: this one's peak may be that of another test, and far above
    code = (
        "from sdjax import measuring; large = bytearray(200 * 2**20); before = measuring.peak_bytes(); del large;"
        "measuring.forget_peak(); print(before - measuring.peak_bytes())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": ROOT}, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) > 100 * 2**20


HEAVY = {"jax", "jaxlib", "flax", "numpy", "scipy", "PIL", "tokenizers", "huggingface_hub", "starlette", "uvicorn"}


@pytest.mark.parametrize(
    "statement",
    [
        "import sdjax",
        "from sdjax.errors import SdjaxError",
        "from sdjax import cli; cli.app(['--help'], standalone_mode=False)",
        "from sdjax import cli; cli.app(['bench', '--help'], standalone_mode=False)",
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(statement):
    code = f"{statement}\nimport sys\nprint('found', sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": ROOT}, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "found []"
