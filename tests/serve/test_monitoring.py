"""What `deploy/monitoring` asks for is what the server has."""

import json
import re
from pathlib import Path

import pytest
import yaml

from tests.serve.conftest import KEY, wait_for

FILES = Path(__file__).parents[2] / "deploy" / "monitoring"
NAME = re.compile(r"\b(?:sdjax|process)_\w+")


@pytest.fixture(scope="module")
def names(serve_all):
    """Of all numbers that a server with some work behind it has."""
    server = serve_all(api_key=[KEY])
    server.wait(server.submit(steps=1), "complete")
    text = wait_for(lambda: "phase_seconds_sum{" in (text := server.client.get("/metrics").text) and text)
    return set(NAME.findall(text))


def expressions(file):
    """The queries of a dashboard, or of rules."""
    if file.suffix == ".json":
        return [target["expr"] for panel in json.loads(file.read_text())["panels"] for target in panel["targets"]]
    return [rule["expr"] for group in yaml.safe_load(file.read_text())["groups"] for rule in group["rules"]]


@pytest.mark.parametrize("name", ["grafana.json", "sdjax-alerts.yml"])
def test_every_number_that_is_asked_for_is_there(names, name):
    asked = expressions(FILES / name)
    assert asked
    for expression in asked:
        assert NAME.findall(expression), expression
        assert set(NAME.findall(expression)) <= names, expression
        assert expression.count("(") == expression.count(")")


def test_panels_of_the_dashboard_lie_beside_each_other():
    panels = json.loads((FILES / "grafana.json").read_text())["panels"]
    places = [
        (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
        for panel in panels
        for x in range(panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["h"])
    ]
    assert len(set(places)) == len(places)
    assert all(x < 24 for x, _ in places)
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_prometheus_reads_the_numbers_with_a_key(serve):
    server = serve(api_key=[KEY])
    (job,) = yaml.safe_load((FILES / "prometheus.yml").read_text())["scrape_configs"]
    assert list(job["authorization"]) == ["credentials_file"]  # whose scheme is Bearer unless another one is named
    path = job["metrics_path"]
    assert server.client.get(path, headers={"Authorization": "Bearer none"}).status_code == 401
    answer = server.client.get(path, headers={"Authorization": f"Bearer {KEY}"})
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
