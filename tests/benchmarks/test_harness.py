"""The benchmark harness as a command: a line a case, JSON beside it, and what it says when a side can't."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import report, timing
from benchmarks.__main__ import main
from benchmarks.cases import FROM_FOLDER, WHAT, Case
from benchmarks.models import BUNDLED
from benchmarks.sides import ours

REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


def harness(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *map(str, arguments)],
        cwd=REPOSITORY,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )


def measured(tmp_path, *arguments):
    """Run a case, and give its printed line and what its JSON says of each side."""
    done = harness(*arguments, "--repeats", 1, "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    (result,) = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["results"]
    return done.stdout, result["sides"]


@pytest.mark.parametrize("case", ["unet", "load"])
def test_a_case_prints_a_line_with_the_ratio_to_its_peer(tmp_path, case):
    line, sides = measured(tmp_path, case, "--peers", "diffusers")
    assert line.startswith(f"{case} bundled batch 1 float32 cpu | sdjax: ")
    assert f"ratio {sides['diffusers']['ratio']:.2f}" in line
    assert sides["diffusers"]["ratio"] == sides["diffusers"]["seconds"] / sides["sdjax"]["seconds"]
    assert all(side["peak_host_bytes"] > 10 * 2**20 for side in sides.values())


def test_a_started_server_is_asked_for_all_pictures_of_the_batch(tmp_path):
    line, sides = measured(tmp_path, "throughput", "--batch", 2, "--steps", 1)
    assert line.startswith("throughput-1steps bundled batch 2 float32 cpu | sdjax: ")
    assert 0 < sides["sdjax"]["seconds"] < sides["sdjax"]["prepare_seconds"]
    assert sides["sdjax"]["peak_host_bytes"] > 100 * 2**20  # the server's, not the worker's


def test_the_first_picture_is_that_of_a_whole_process(tmp_path):
    _, sides = measured(tmp_path, "first-warm", "--steps", 1)
    assert 0.5 < sides["sdjax"]["seconds"] < sides["sdjax"]["first_seconds"]  # which compiled
    assert sides["sdjax"]["cpu_seconds"] is None  # it is other processes' time


def test_every_run_of_loading_is_the_first_of_a_process(monkeypatch):
    started, asked = [], []

    class Watched(timing.Worker):
        def __init__(self, side, *more):
            started.append(side)
            super().__init__(side, *more)

        def ask(self, what):
            asked.append(what)
            return super().ask(what)

    monkeypatch.setattr(timing, "Worker", Watched)
    side = timing.measure(Case("load", "bundled", folder=str(BUNDLED)), ["sdjax"], repeats=2)["sides"]["sdjax"]
    assert started == ["sdjax"] * 3  # one isn't counted
    assert asked == ["matmul"] * 2
    assert len(side["all_seconds"]) == 2


def test_a_side_that_ends_between_two_runs_is_skipped_with_a_word(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint"
    shutil.copytree(BUNDLED, folder)

    class Unlucky(timing.Worker):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            shutil.rmtree(folder, ignore_errors=True)  # before the next one begins

    monkeypatch.setattr(timing, "Worker", Unlucky)
    side = timing.measure(Case("load", "bundled", folder=str(folder)), ["sdjax"], repeats=1)["sides"]["sdjax"]
    assert set(side) == {"skipped"}
    assert "there is no folder or file" in side["skipped"]


def test_an_absent_peer_is_skipped_with_a_word(tmp_path):
    python = tmp_path / "python"  # an interpreter without the peer's packages
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    line, sides = measured(tmp_path, "vae-decode", "--peers", "diffusers", "--python", f"diffusers={python}")
    assert "diffusers: skipped (No module named" in line
    assert set(sides["diffusers"]) == {"skipped"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--python", "openvino"], "must be SIDE=PYTHON"),
        (["--python", "openvino=/no/python"], "there is no program '/no/python'"),
        (["--batch", "0"], "must be at least 1, not 0"),
        (["--model", "sd-9"], "invalid choice: 'sd-9'"),
    ],
)
def test_wrong_options_are_named(capsys, arguments, said):
    with pytest.raises(SystemExit, match="2"):
        main(["unet", *arguments])
    assert said in capsys.readouterr().err


def test_every_case_is_one_that_sdjax_can_do():
    assert {*ours.CASES, *ours.WITH_FOLDER} == set(WHAT)
    assert set(ours.WITH_FOLDER) == FROM_FOLDER


def test_the_folder_of_a_case_stays_out_of_its_results():
    case = Case("load", "bundled", folder=str(BUNDLED))
    assert "folder" not in case.as_dict()
    assert case == Case("load", "bundled")


def test_a_slower_run_fails_the_comparison(tmp_path, capsys):
    def written(name, ratio):
        sides = {"sdjax": {"seconds": 1.0}, "diffusers": {"seconds": ratio, "ratio": ratio}}
        file = tmp_path / name
        file.write_text(json.dumps({"results": [{"name": "unet", "sides": sides}]}), encoding="utf-8")
        return file

    before, after = written("before.json", 1.5), written("after.json", 1.2)
    assert report.compare(before, after, tolerance=1.3)[1]
    assert main(["compare", str(before), str(after)]) == 1
    assert "unet: 1.250 times the time by the ratio to diffusers SLOWER" in capsys.readouterr().out
