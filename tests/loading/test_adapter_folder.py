"""An adapter by its name, inside one folder; nothing leads out of it."""

import pytest

from sdjax import RequestError
from sdjax.loading import find_adapter


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "adapters"
    (folder / "sub" / "peft").mkdir(parents=True)
    for name in ("style.v1.5 é.safetensors", "sub/other.safetensors"):
        (folder / name).write_bytes(b"x")
    (tmp_path / "secret.safetensors").write_bytes(b"x")
    (folder / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    (folder / "linked").symlink_to(tmp_path)
    return folder


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("style.v1.5 é", "style.v1.5 é.safetensors"),
        ("style.v1.5 é.safetensors", "style.v1.5 é.safetensors"),
        ("sub/other", "sub/other.safetensors"),
        ("sub/peft", "sub/peft"),
    ],
)
def test_a_name_is_found_with_and_without_its_suffix(folder, name, found):
    assert find_adapter(folder, name) == folder.resolve() / found


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("absent", "there is no adapter 'absent'"),
        ("../secret", "must be a name inside the adapter folder"),
        ("sub/../../secret", "must be a name inside"),
        ("/etc/passwd", "must be a name inside"),
        ("", "must be a name inside"),
        (".", "must be a name inside"),
        ("a\\..\\b", "must be a name inside"),
        ("\0", "must be a name inside"),
        ("link", "must not be a link"),
        ("linked/secret", "must not be a link"),
        ("x" * 300, "there is no adapter"),
    ],
)
def test_a_name_that_leads_out_or_nowhere_is_refused(folder, name, said):
    with pytest.raises(RequestError, match=said):
        find_adapter(folder, name)


def test_a_folder_that_is_not_there_is_said_without_its_path(folder):
    with pytest.raises(RequestError, match=r"^the folder of adapters is not there$"):
        find_adapter(folder / "nowhere", "style")
