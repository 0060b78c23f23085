"""Settings from flags, the environment and a file; and addresses that are refused."""

import pytest
from click.testing import CliRunner

from sdjax.errors import RequestError
from sdjax.serve.cli import _command
from sdjax.serve.settings import load_settings


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in ("WORKER_ID", "SD_VERSION", "PORT", "CALLBACK_URL", "MODEL_PATH", "SDJAX_API_KEY", "SDJAX_MODEL"):
        monkeypatch.delenv(name, raising=False)


def test_the_original_workers_variables_are_read(monkeypatch):
    for name, value in {
        "WORKER_ID": "test",
        "SD_VERSION": "v1-5",
        "PORT": "8601",
        "CALLBACK_URL": "http://localhost:7835/",
        "MODEL_PATH": "/models/sd",
    }.items():
        monkeypatch.setenv(name, value)
    settings = load_settings({})
    assert (settings.worker_id, settings.sd_version, settings.port) == ("test", "v1-5", 8601)
    assert (settings.callback_url, str(settings.model_path)) == ("http://localhost:7835", "/models/sd")


def test_flags_win_over_the_environment_and_that_over_the_file(monkeypatch, tmp_path):
    file = tmp_path / "sdjax.toml"
    file.write_text('port = 1\nqueue_limit = 2\nkeep_alive = 3\napi_key = ["a", "b"]\nsd_version = "xl"\n')
    monkeypatch.setenv("SDJAX_QUEUE_LIMIT", "20")
    monkeypatch.setenv("PORT", "10")
    settings = load_settings({"port": "100", "host": None}, file)
    assert (settings.port, settings.queue_limit, settings.keep_alive) == (100, 20, 3)
    assert [key.get_secret_value() for key in settings.api_key] == ["a", "b"]
    assert settings.sd_version == "xl"


def test_lists_in_the_environment_are_separated_by_commas(monkeypatch):
    monkeypatch.setenv("SDJAX_API_KEY", "one, two,")
    assert [key.get_secret_value() for key in load_settings({}).api_key] == ["one", "two"]


def test_sizes_are_pairs_of_pixels():
    assert load_settings({"size": ["512x768", "64"]}).sizes == ((512, 768), (64, 64))
    assert load_settings({}).sizes is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_a_public_address_needs_a_key(host):
    with pytest.raises(RequestError, match="--api-key"):
        load_settings({"host": host})
    assert load_settings({"host": host, "api_key": ["x"]}).host == host
    assert load_settings({"host": host, "allow_unauthenticated": True}).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.8.8"])
def test_a_loopback_address_needs_none(host):
    assert load_settings({"host": host}).is_loopback


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"port": "x"}, "--port: "),
        ({"port": "65536"}, "--port: "),
        ({"sd_version": "v3"}, "--sd-version: "),
        ({"callback_url": "localhost:7835"}, "--callback-url: must be a URL"),
        ({"drain": "-1"}, "--drain: "),
        ({"drain": "nan"}, "--drain: "),
        ({"api_key": [""]}, "--api-key: "),
        ({"model": "x", "sd_version": "xl"}, "--model: give either"),
        ({"size": ["64", "big"]}, "--size: must be like 512 or 512x768 (width x height), not 'big'"),
        ({"size": ["0x64"]}, "--size: must be like 512 or 512x768 (width x height), not '0x64'"),
        ({"attempts": "0"}, "--attempts: "),
        ({"nonsense": "x"}, "nonsense: there is no such setting"),
    ],
)
def test_a_wrong_setting_is_named(flags, said):
    with pytest.raises(RequestError) as caught:
        load_settings(flags)
    assert said in str(caught.value)


def test_a_wrong_key_in_the_file_is_named(tmp_path):
    file = tmp_path / "sdjax.toml"
    file.write_text("queue_limt = 2\n")
    with pytest.raises(RequestError, match="queue_limt"):
        load_settings({}, file)
    file.write_text("queue_limit = \n")
    with pytest.raises(RequestError, match=r"sdjax\.toml"):
        load_settings({}, file)
    with pytest.raises(RequestError, match="there is no file"):
        load_settings({}, tmp_path / "absent.toml")


def test_secrets_are_not_shown():
    with pytest.raises(RequestError) as caught:
        load_settings({"api_key": ["very secret"], "port": "x"})
    assert "very secret" not in str(caught.value)
    assert "very secret" not in repr(load_settings({"api_key": ["very secret"]}))


def test_the_help_shows_defaults():
    said = CliRunner().invoke(_command(), ["--help"], env={"COLUMNS": "200"}).output
    for flag, default in (("--port", "8600"), ("--queue-limit", "100"), ("--attempts", "2"), ("--host", "127.0.0.1")):
        (line,) = [line for line in said.splitlines() if f" {flag} " in line]
        assert f"(default: {default})" in line
