"""Links to pictures that open without a key."""

import httpx
import pytest

from sdjax.serve.links import GOOD_FOR, is_signed, link_secret, signed
from tests.serve.conftest import KEY


@pytest.fixture(scope="module")
def keyed(serve_all):
    return serve_all(api_key=[KEY])


def test_a_signed_link_opens_one_picture_without_a_key_for_an_hour(keyed):
    jobs = [keyed.submit(steps=1) for _ in range(2)]
    for job in jobs:
        keyed.wait(job, "complete")
    paths = [f"/v1/jobs/{job}/images/0" for job in jobs]
    secret = link_secret(keyed.app.state.front.settings.data_dir)
    link = signed(paths[0], secret)
    with httpx.Client(base_url=keyed.url) as stranger:
        assert stranger.get(link).content.startswith(b"\x89PNG")
        query = link.partition("?")[2]
        wrong = [
            paths[0],
            f"{paths[1]}?{query}",
            f"/v1/jobs/{jobs[0]}?{query}",
            f"/v1/jobs?{query}",
            link[:-1],
            link.replace("expires=1", "expires=2"),
            signed(paths[0], secret, now=0),
            signed(paths[0], b"x" * 32),
            f"{paths[0]}?expires=&signature=",
            f"{paths[0]}?expires=9&signature=%ff%00é",
        ]
        for path in wrong:
            assert stranger.get(path).status_code == 401, path
        assert stranger.delete(link).status_code == 401


def test_links_are_good_on_every_server_of_a_folder_and_for_an_hour(tmp_path):
    path = f"/v1/jobs/{'0' * 32}/images/3"
    first, second = link_secret(tmp_path), link_secret(tmp_path)
    query = dict(part.split("=") for part in signed(path, first, now=100.0).partition("?")[2].split("&"))
    assert is_signed(path, query, second, now=100.0 + GOOD_FOR - 1)
    assert not is_signed(path, query, second, now=100.0 + GOOD_FOR + 1)
    assert [file.stat().st_mode & 0o777 for file in tmp_path.iterdir()] == [0o600]
    assert link_secret(tmp_path / "another") != first
