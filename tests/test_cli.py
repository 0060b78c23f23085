"""The command line as a person uses it: what it prints, writes and says when something is wrong."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from typer.testing import CliRunner

from sdjax import cli
from sdjax.variants import VARIANTS
from tests.commands import interruptible
from tests.native import FACTOR, SIDE

PROMPT = "a red circle on a blue background"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def environment_of(cache):
    return {**os.environ, "SDJAX_CACHE_DIR": str(cache), "PYTHONPATH": str(Path(cli.__file__).parents[1])}


def run(*arguments, cache, cwd=None, **environment):
    return subprocess.run(
        [sys.executable, "-m", "sdjax", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**environment_of(cache), **environment},
        check=False,
    )


def call(capsys, *arguments):
    """Run a command in this process: its exit code, standard output and standard error."""
    import unittest.mock

    with unittest.mock.patch.object(sys, "argv", ["sdjax", *map(str, arguments)]), pytest.raises(SystemExit) as stop:
        cli.main()
    said = capsys.readouterr()
    return stop.value.code, said.out, said.err


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SDJAX_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


def test_a_prompt_becomes_a_picture_whose_path_is_printed(cache, tmp_path):
    done = run("generate", PROMPT, "--seed", 1, "-o", "red.png", cache=cache, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "red.png\n", "")
    with Image.open(tmp_path / "red.png") as picture:
        assert picture.size == (SIDE, SIDE)
        pixels = np.asarray(picture).astype(int)
    assert pixels[0, 0, 2] > 150 > pixels[0, 0, 0]  # blue corners
    assert (pixels[..., 0] > 180).sum() > 100  # and something red
    read = run("inspect", "red.png", cache=cache, cwd=tmp_path)
    assert f"prompt: {PROMPT}\nsteps: 20\nsampler: ddim\n" in read.stdout
    assert "seed: 1\nsize: 64x64\nmodel: tiny\n" in read.stdout
    assert any((cache / "compiled").iterdir())


def test_several_prompts_from_a_file_as_json(here, capsys):
    text = "\ufeff# shapes\na red circle\r\n\n  # later: a ring\n  a blue star  \n\\# a blue star\n"
    Path("prompts.txt").write_text(text, encoding="utf-8", newline="")
    code, out, err = call(
        capsys, "generate", "--prompts", "prompts.txt", "--num", 2, "--steps", 2, "--seed", 5, "--json", "-o", "p.png"
    )
    assert (code, err) == (0, "")
    told = [json.loads(line) for line in out.splitlines()]
    assert [(entry["path"], entry["prompt"], entry["seed"]) for entry in told] == [
        ("p-1.png", "a red circle", 5),
        ("p-2.png", "a red circle", 6),
        ("p-3.png", "a blue star", 7),
        ("p-4.png", "a blue star", 8),
        ("p-5.png", "# a blue star", 9),
        ("p-6.png", "# a blue star", 10),
    ]
    assert all(Path(entry["path"]).is_file() for entry in told)


def test_a_file_of_comments_holds_no_prompts(here, capsys):
    Path("prompts.txt").write_text("# nothing yet\n\n", encoding="utf-8")
    assert call(capsys, "generate", "--prompts", "prompts.txt")[::2] == (
        2,
        "sdjax: prompts.txt holds no prompts: write one a line\n",
    )


def drawn(capsys, *arguments):
    code, out, err = call(capsys, "generate", *arguments, "--steps", 1)
    assert (code, err) == (0, "")
    return out.splitlines()


@pytest.mark.parametrize("folder", ["there", "new/", "new", "new/and/deeper/", "v1.5/"])
def test_pictures_go_into_a_folder_which_is_made_where_it_is_not_there(here, capsys, folder):
    Path("there").mkdir()
    paths = [str(Path(folder) / f"out-{i}.png") for i in (1, 2, 3)]
    assert drawn(capsys, PROMPT, "--num", 2, "-o", folder) == paths[:2]
    before = [Path(path).read_bytes() for path in paths[:2]]
    assert drawn(capsys, PROMPT, "a blue star", "-o", folder) == [paths[2], str(Path(folder) / "out-4.png")]
    assert [Path(path).read_bytes() for path in paths[:2]] == before


def test_no_picture_is_written_over(here, capsys):
    Path("out.png").write_bytes(b"mine")
    assert drawn(capsys, PROMPT) == ["out-1.png"]
    assert drawn(capsys, PROMPT) == ["out-2.png"]
    Path("out-7.png").mkdir()
    assert drawn(capsys, PROMPT, "--num", 2) == ["out-8.png", "out-9.png"]
    assert Path("out.png").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("name", "kind"), [("a.jpg", "JPEG"), ("a.JPEG", "JPEG"), ("a.webp", "WEBP"), ("a.png", "PNG")]
)
def test_the_end_of_a_files_name_is_its_format(here, capsys, name, kind):
    assert drawn(capsys, PROMPT, "--seed", 3, "-o", name) == [name]
    with Image.open(name) as picture:
        assert (picture.format, picture.size) == (kind, (SIDE, SIDE))
    assert json.loads(call(capsys, "inspect", "--json", name)[1])["seed"] == 3


def test_an_interrupted_command_goes_on_where_it_was(here, capsys):
    Path("prompts.txt").write_text("a red circle\na blue star\na white ring\n", encoding="utf-8")
    command = ["--prompts", "prompts.txt", "--num", 2, "-o", "pictures/", "--skip-existing"]
    names = [f"pictures/out-{i}.png" for i in range(1, 7)]
    assert drawn(capsys, *command) == names
    whole = {name: Path(name).read_bytes() for name in names}
    for name in (names[0], names[3], names[4], names[5]):
        Path(name).unlink()
    code, out, err = call(capsys, "generate", *command, "--steps", 1)
    assert (code, out.split()) == (0, [names[0], *names[3:]])
    assert err == "sdjax: 2 of 6 pictures are there already\n"
    assert {name: Path(name).read_bytes() for name in names} == whole
    code, out, err = call(capsys, "generate", *command, "--steps", 1)
    assert (code, out, err) == (0, "", "sdjax: 6 of 6 pictures are there already\n")


@pytest.mark.parametrize(
    ("arguments", "other"),
    [
        (["a blue star"], "prompt"),
        ([PROMPT, "--negative", "a blue star"], "negative_prompt"),
        ([PROMPT, "--seed", 6], "seed"),
        ([PROMPT, "--guidance", 2, "--sampler", "euler"], "sampler, guidance_scale"),
        ([PROMPT, "--size", "32x64"], "size"),
    ],
)
def test_what_is_there_must_be_a_picture_of_the_same_command(here, capsys, arguments, other):
    drawn(capsys, PROMPT, "--seed", 5)
    before = Path("out.png").read_bytes()
    code, out, err = call(capsys, "generate", *arguments, "--steps", 1, "--skip-existing")
    assert (code, out) == (2, "")
    said = f"sdjax: --skip-existing: out.png was drawn with another {other}; give the same, or another --output\n"
    assert err == said
    assert Path("out.png").read_bytes() == before


def test_a_picture_of_something_else_is_not_skipped(here, capsys):
    Image.new("RGB", (64, 64)).save("out.png")
    code, _, err = call(capsys, "generate", PROMPT, "--skip-existing")
    assert (code, err) == (
        2,
        "sdjax: --skip-existing: 'out.png' holds no generation parameters; give another --output\n",
    )


def test_a_picture_and_a_mask_start_another_one(here, capsys):
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    Image.fromarray(noise).save("photo.png")
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[:, SIDE // 2 :] = 255
    Image.fromarray(mask).save("mask.png")
    code, _, err = call(
        capsys, "generate", PROMPT, "--image", "photo.png", "--mask", "mask.png", "--strength", "0.9", "--steps", 4
    )
    assert (code, err) == (0, "")
    pixels = np.asarray(Image.open("out.png"))
    assert np.array_equal(pixels[:, : SIDE // 2], noise[:, : SIDE // 2])
    assert not np.array_equal(pixels[:, SIDE // 2 :], noise[:, SIDE // 2 :])


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "there is no prompt"),
        (
            [PROMPT, "--size", "65"],
            2,
            f"width must be a multiple of {FACTOR}, not 65: 64 and {64 + FACTOR} are nearest",
        ),
        ([PROMPT, "--size", "big"], 2, "--size: must be like 512 or 512x768"),
        ([PROMPT, "--model", "sd-v1-6"], 2, "there is no model 'sd-v1-6': did you mean 'sd-v1-5'?"),
        ([PROMPT, "--model", "./nowhere"], 1, "there is no folder or file './nowhere'"),
        ([PROMPT, "--model", "./old.ckpt"], 1, "reading a pickle runs whatever code it holds"),
        ([PROMPT, "--model", "someone/something", "--offline"], 1, "someone/something is not in the local cache"),
        ([PROMPT, "--sampler", "dimm"], 2, "sampler must be one of ddim, ddpm"),
        ([PROMPT, "--schedule", "karas"], 2, "schedule must be one of karras"),
        ([PROMPT, "--steps", "-3"], 2, "steps must be a whole number from 1 to 1000, not -3"),
        ([PROMPT, "--steps", "many"], 2, "valid integer"),
        ([PROMPT, "--num", "0"], 2, "--num must be at least 1"),
        ([PROMPT, "--seed", "-1"], 2, "seed must be a whole number from 0"),
        ([PROMPT, "--dtype", "int8"], 2, "dtype must be float32, bfloat16, float16"),
        ([PROMPT, "--guidance", "nan"], 2, "guidance_scale must be a finite number"),
        ([PROMPT, "-o", "nowhere/out.png"], 2, "there is no folder 'nowhere'; make it first"),
        ([PROMPT, "-o", "out.gif"], 2, "a file that ends in .png, .jpg, .jpeg, .webp, not 'out.gif'"),
        ([PROMPT, "-o", "good.png/"], 2, "'good.png' is a file, no folder"),
        ([PROMPT, "-o", "good.png/x/out.png"], 2, "there is no folder 'good.png/x'"),
        ([PROMPT, "--image", "photo.png"], 2, "there is no file 'photo.png'"),
        ([PROMPT, "--image", "text.txt"], 2, "'text.txt' is not a picture that can be read"),
        ([PROMPT, "--mask", "good.png"], 2, "mask needs a picture"),
        ([PROMPT, "--image", "good.png", "--strength", "1.5"], 2, "strength must be a number from 0 to 1"),
        ([PROMPT, "--control", "folder"], 2, "--control must be MODEL:IMAGE or MODEL:IMAGE:SCALE"),
        ([PROMPT, "--control", "folder:good.png"], 1, "there is no folder or file 'folder'"),
        ([PROMPT, "--lora", "style.safetensors:0.5"], 1, "there is no LoRA file or folder 'style.safetensors'"),
        ([PROMPT, "--lora", "text.txt:nan"], 2, "must be a finite number"),
        ([PROMPT, "--embedding", "word.safetensors"], 1, "word.safetensors"),
        ([PROMPT, "--clip-skip", "99"], 2, "clip_skip"),
        ([PROMPT, "--prompts", "empty.txt"], 2, "empty.txt holds no prompts"),
        ([PROMPT, "--frobnicate"], 2, "No such option"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(here, capsys, arguments, code, said):
    Path("text.txt").write_text("words")
    Path("empty.txt").write_text("\n")
    Path("old.ckpt").write_bytes(b"pickle")
    Image.new("RGB", (64, 64)).save("good.png")
    got, out, err = call(capsys, "generate", *arguments)
    assert (got, out) == (code, "")
    assert said in err
    assert err.count("\n") == 1
    assert err.startswith("sdjax: ")
    assert not Path("out.png").exists()


def test_what_a_long_prompt_loses_is_said_in_a_short_line(here, capsys):
    code, out, err = call(capsys, "generate", "a red circle " * 400, "--steps", 1)
    assert (code, out) == (0, "out.png\n")
    assert "sdjax: warning: a prompt" in err
    assert "cut off" in err
    assert err.count("\n") == 1
    assert len(err) < 450


def with_texts(file, **texts):
    info = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    Image.new("RGB", (4, 4)).save(file, pnginfo=info)


def test_inspect_prints_values_of_other_tools_as_they_stand(here, capsys):
    with_texts(
        "a.png", parameters='a cat\nSteps: 1, Template: "a b" c, Seed: 1, Model hash: 61e4567890, CFG scale: 1e999'
    )
    code, out, err = call(capsys, "inspect", "a.png")
    assert (code, err) == (0, "")
    assert out == 'prompt: a cat\nsteps: 1\nseed: 1\nguidance_scale: 1e999\nTemplate: "a b" c\nModel hash: 61e4567890\n'
    code, out, _ = call(capsys, "inspect", "--json", "a.png")
    assert json.loads(out, parse_constant=pytest.fail)["Model hash"] == "61e4567890"


def test_inspect_prints_the_texts_of_a_file_that_no_tool_wrote(here, capsys):
    with_texts("a.png", Comment="drawn \x1b[31mby hand")
    code, out, err = call(capsys, "inspect", "a.png")
    assert (code, out) == (0, "Comment: drawn \\x1b[31mby hand\n")
    assert err == "sdjax: warning: a.png: no tool's parameters are found; these are the texts in the file\n"
    assert json.loads(call(capsys, "inspect", "--json", "a.png")[1]) == {"texts": {"Comment": "drawn \x1b[31mby hand"}}


@pytest.mark.parametrize("arguments", [["bad.png"], ["nowhere.png"], ["plain.png"], ["."]])
def test_inspect_says_what_holds_no_parameters(here, capsys, arguments):
    Path("bad.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    Image.new("RGB", (4, 4)).save("plain.png")
    code, out, err = call(capsys, "inspect", *arguments)
    assert (code, out) == (1, "")
    assert arguments[0] in err


def test_models_is_a_table_whose_lines_are_whole_in_a_pipe(cache, tmp_path):
    listed = run("models", cache=cache, HF_HOME=str(tmp_path), COLUMNS="40")
    assert listed.returncode == 0, listed.stderr
    rows = {line.split()[0]: line.split() for line in listed.stdout.splitlines()[1:]}
    assert set(rows) == set(VARIANTS)
    assert rows["tiny"][4] == "yes"
    assert rows["sd-v2-1"][4] == "no"
    assert all(rows[name][-1] == row.source for name, row in VARIANTS.items())


@pytest.mark.parametrize("columns", [80, 100, 200])
def test_models_fits_a_terminal_and_cuts_no_name(capsys, monkeypatch, columns):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, err = call(capsys, "models")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= columns
    assert {row.source for row in VARIANTS.values()} <= set(out.split())


def test_version_prints_what_it_stands_on(capsys):
    code, out, _ = call(capsys, "version")
    assert code == 0
    assert out.startswith("sdjax ")


def test_help_lists_the_commands():
    done = CliRunner().invoke(cli.app, ["--help"])
    assert done.exit_code == 0
    for command in ("generate", "models", "inspect", "version"):
        assert command in done.stdout


def test_an_interrupt_ends_with_130_and_leaves_whole_pictures(cache, tmp_path):
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\n" * 1000, encoding="utf-8")
    process = subprocess.Popen(
        interruptible("generate", "--prompts", "prompts.txt", "--steps", 100),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment_of(cache),
    )
    first = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert err.strip().endswith("sdjax: interrupted")
    printed = [first.strip(), *rest.split()]
    assert 1 <= len(printed) < 1000
    assert {path.name for path in tmp_path.iterdir()} == {"prompts.txt", *printed}
    for name in printed:
        Image.open(tmp_path / name).load()


def test_what_a_request_lacks_is_a_line_each_on_standard_error(here, capsys):
    code, out, err = call(capsys, "generate", "a red dog <lora:x:0.8>", "a dog " * 100, "--steps", 1, "--seed", 1)
    assert (code, out) == (0, "out-1.png\nout-2.png\n")
    lines = err.splitlines()
    assert [line for line in lines if "does not know: dog; it knows: circle" in line]
    assert [line for line in lines if "<lora:x:0.8> is left out" in line]
    (cut,) = [line for line in lines if "cut off" in line]
    assert len(cut) < 220
    assert all(line.startswith("sdjax: warning: ") for line in lines)
    assert len(lines) == len(set(lines)) == 3


def test_an_adapter_that_a_prompt_names_is_drawn_with_and_is_in_the_pictures_parameters(here, capsys):
    folder = Path(cli.__file__).parent / "bundled" / "loras"
    shared = ["--steps", 2, "--seed", 1]
    code, _, err = call(capsys, "generate", "a star <lora:outline:0.8>", "--lora-dir", folder, "-o", "a.png", *shared)
    assert (code, err) == (0, "")
    call(capsys, "generate", "a star", "--lora", f"{folder / 'outline.safetensors'}:0.8", "-o", "b.png", *shared)
    call(capsys, "generate", "a star", "-o", "c.png", *shared)
    named, given, plain = (np.asarray(Image.open(file)) for file in ("a.png", "b.png", "c.png"))
    np.testing.assert_array_equal(named, given)
    assert (named != plain).any()
    _, out, _ = call(capsys, "inspect", "a.png", "--json")
    assert "outline:0.8" in str(json.loads(out)["loras"])
    code, _, err = call(capsys, "generate", "a star <lora:outlin:0.8>", "--lora-dir", folder, "-o", "d.png", *shared)
    assert (code, err) == (0, "sdjax: warning: <lora:outlin:0.8> is left out: there is no adapter 'outlin'\n")
    np.testing.assert_array_equal(np.asarray(Image.open("d.png")), plain)


def test_a_models_words_are_listed(here, capsys):
    code, out, err = call(capsys, "models", "tiny")
    assert (code, err) == (0, "")
    assert out.startswith("model: tiny\nwhat it is: ")
    assert "words: circle, square, triangle" in out
    assert max(map(len, out.splitlines())) <= 100
    (here / "mine").mkdir()
    (here / "mine" / "card.json").write_text('{"steps": 7, "vocabulary": ["dog"]}')
    assert "steps: 7\n" in call(capsys, "models", "./mine")[1]
    code, _, err = call(capsys, "models", "tinny")
    assert (code, err) == (2, "sdjax: there is no model 'tinny': did you mean 'tiny'?\n")
