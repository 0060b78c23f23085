"""What the README shows of the library runs as it stands there."""

import re
from pathlib import Path

import numpy as np

import sdjax

README = Path(__file__).parent.parent / "README.md"


def test_the_first_examples_run_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    section = README.read_text(encoding="utf-8").partition("## As a library")[2].partition("### ")[0]
    names = {}
    for example in re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL):
        exec(example, names)
    assert (tmp_path / "star.png").is_file()
    assert len(names["out"].images) == len(names["out"].seeds) == 4
    same = sdjax.Pipeline.from_pretrained()("a red circle on a blue background", seed=1, sampler="unipc", steps=8)
    drawn = np.round(255 * np.asarray(names["pictures"])[0])
    assert np.abs(drawn - np.asarray(same.images[0], np.float32)).max() <= 1
