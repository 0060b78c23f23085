"""Cancelling touches one job, and no other."""

import pytest

from tests.serve.conftest import wait_for


def test_a_waiting_job_is_cancelled_at_once_and_its_neighbours_are_not(serve):
    server = serve()
    server.engine.go.clear()
    first, second, third = (server.submit(f"number {i}", steps=2, seed=i) for i in range(3))
    server.wait(first, "running")
    answer = server.client.delete(f"/v1/jobs/{second}")
    assert answer.status_code == 200
    assert answer.json()["state"] == "cancelled"
    assert server.job(first)["state"] == "running"
    assert server.job(third)["position"] == 1
    server.engine.go.set()
    assert server.wait(first, "complete", "error", "cancelled")["state"] == "complete"
    assert server.wait(third, "complete", "error", "cancelled")["state"] == "complete"
    assert server.job(second)["state"] == "cancelled"
    assert [event["event"] for event in server.events(second)][-1] == "cancelled"


def test_a_running_job_stops_within_a_step_and_the_next_one_is_drawn(serve):
    server = serve(step_seconds=0.05)
    running, waiting = server.submit(steps=150), server.submit(steps=1)
    server.wait(running, "running")
    assert server.client.delete(f"/v1/jobs/{running}").json()["state"] == "cancelled"
    stopped_at = server.engine.steps_drawn
    server.wait(waiting, "complete")
    assert server.engine.steps_drawn - stopped_at <= 1 + 1  # a step of the one, and the other's only one
    assert server.job(running)["images"] == []


def test_cancelling_twice_is_the_same_as_once(serve):
    server = serve()
    server.engine.go.clear()
    job_id = server.submit()
    first, second = (server.client.delete(f"/v1/jobs/{job_id}") for _ in range(2))
    assert (first.status_code, second.status_code) == (200, 200)
    assert first.json() == second.json()
    server.engine.go.set()


def test_a_job_that_ended_stays_as_it_is(server):
    for prompt, state in (("a circle", "complete"), ("fail", "error")):
        job_id = server.submit(prompt, steps=1)
        server.wait(job_id, state)
        answer = server.client.delete(f"/v1/jobs/{job_id}")
        assert answer.status_code == 409
        assert answer.json()["error"]["code"] == "already_finished"
        assert server.job(job_id)["state"] == state


@pytest.mark.parametrize("times", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_cancelling_at_the_last_step_leaves_one_end(serve, times):
    server = serve()
    for _ in range(times):
        job_id = server.submit(steps=2)
        status = server.client.delete(f"/v1/jobs/{job_id}").status_code
        ends = [event["event"] for event in server.events(job_id)]
        assert ends[-1] == ("cancelled" if status == 200 else "complete")
        assert len({"complete", "cancelled", "error"} & set(ends)) == 1
    wait_for(lambda: server.store.counts()["running"] == 0)
