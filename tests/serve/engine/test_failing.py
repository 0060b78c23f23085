"""What goes wrong with a job is that job's error, and nobody else's."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import freeze, unfreeze

import sdjax
from sdjax.serve import drawing
from sdjax.serve.buckets import bucket
from sdjax.serve.engine import GenerationEngine
from tests.serve.engine.jobs import REQUEST, drawn_by_library, pixels


def test_numbers_that_are_not_finite_are_an_error_that_names_the_step(pipe, store, start, submit, ended, monkeypatch):
    prepare = drawing.prepare

    def poisoned(pipe, job_id, requests):
        (row,) = prepare(pipe, job_id, requests)
        if row.request.seeds != (13,):
            return [row]
        table = row.batch.table
        return [row._replace(batch=row.batch._replace(table=table._replace(B=table.B.at[0, 4].set(jnp.nan))))]

    monkeypatch.setattr(drawing, "prepare", poisoned)
    start()
    jobs = [submit(seed=seed, steps=12) for seed in (12, 13, 14)]
    events = ended(jobs)
    assert [event.name for event in events] == ["complete", "error", "complete"]
    assert events[1].data["code"] == "not_finite"
    assert "step 5 of 12" in events[1].data["message"]
    assert store.image(jobs[1].id, 0) is None
    for job in (jobs[0], jobs[2]):
        np.testing.assert_array_equal(pixels(store, job), drawn_by_library(pipe, job))


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_weights_that_hold_nan_give_an_error_and_no_picture(pipe, store, start, submit, ended, part):
    params = unfreeze(pipe.params)
    leaves, structure = jax.tree.flatten(params[part])
    params[part] = jax.tree.unflatten(structure, [jnp.full_like(leaves[0], jnp.nan), *leaves[1:]])
    broken = sdjax.Pipeline(replace(pipe.checkpoint, params=freeze(params)), name="broken")
    start(broken)
    job = submit()
    (last,) = ended([job])
    assert (last.name, last.data["code"]) == ("error", "not_finite")
    assert store.job(job.id).images == 0


def test_what_fails_in_a_batch_fails_alone(pipe, store, start, submit, ended, monkeypatch):
    walk = drawing.walk

    def failing(pipe, rows, size, calls):
        if any(row.request.seeds == (13,) and row.done >= 2 for row in rows):
            raise RuntimeError("this one is cursed")
        return walk(pipe, rows, size, calls)

    monkeypatch.setattr(drawing, "walk", failing)
    start()
    jobs = [submit(seed=seed, steps=10, preview_every=1) for seed in (12, 13, 14)]
    events = ended(jobs)
    assert [event.name for event in events] == ["complete", "error", "complete"]
    assert events[1].data["code"] == "internal"
    assert "cursed" not in events[1].data["message"]  # it is for the log: who knows what is in it
    for job in (jobs[0], jobs[2]):
        np.testing.assert_array_equal(pixels(store, job), drawn_by_library(pipe, job))


@pytest.mark.parametrize("fits_at_first", [True, False])
def test_a_batch_that_does_not_fit_is_made_smaller(pipe, store, start, submit, ended, monkeypatch, fits_at_first):
    walk, sizes = drawing.walk, []

    def small_device(pipe, rows, size, calls):
        sizes.append(size)
        if size > 1 and len(rows) > 1:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9000000 bytes")
        return walk(pipe, rows, size, calls)

    if fits_at_first:
        engine = start()
    monkeypatch.setattr(drawing, "walk", small_device)
    if not fits_at_first:
        engine = start()
    jobs = [submit(seed=seed, steps=20) for seed in range(4)]
    assert [event.name for event in ended(jobs)] == ["complete"] * 4
    assert sizes.count(2) <= 2  # those of the first round
    next_one = submit()
    ended([next_one])
    np.testing.assert_array_equal(pixels(store, next_one), drawn_by_library(pipe, next_one))
    assert engine.stats().ended["error"] == 0


def test_a_job_that_does_not_fit_at_all_says_so_and_the_next_one_works(store, start, submit, ended, monkeypatch):
    finish = sdjax.Pipeline.finish

    def small_device(self, request, latents):
        if request.seeds == (13,):
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return finish(self, request, latents)

    start()
    monkeypatch.setattr(sdjax.Pipeline, "finish", small_device)
    failed, fine = ended([submit(seed=13), submit(seed=14)])
    assert failed.data["code"] == "out_of_memory"
    assert fine.name == "complete"


def test_a_request_that_the_model_cannot_do_is_an_error_of_that_job(store, start, submit, ended):
    start()
    wrong, lost, fine = submit(sampler="no such"), submit(), submit()
    request = {**REQUEST, "operation": "image_transform", "input_image": {"blob": "0" * 64}, "strength": 0.5}
    lost = store.submit(request, bucket=bucket(request))
    events = ended([wrong, lost, fine])
    assert [event.data.get("code") for event in events] == ["invalid_request", "invalid_request", None]
    assert "no such" in events[0].data["message"]


def test_a_bad_adapter_is_named_as_the_client_named_it(store, start, submit, ended, tmp_path):
    """Its folder on our disk is nobody's business."""
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    start()
    names = {"broken.safetensors": "broken.safetensors", "no such": "gone"}
    jobs = [
        submit(loras=[{"name": name, "path": str(tmp_path / path), "strength": 1.0}]) for name, path in names.items()
    ]
    for name, event in zip(names, ended(jobs), strict=True):
        assert event.data["code"] == "invalid_lora"
        assert name in event.data["message"]
        assert str(tmp_path) not in event.data["message"]


def test_an_engine_that_cannot_get_ready_says_why(pipe, store, monkeypatch):
    engine = GenerationEngine(pipe, store, sizes=[(60, 61)])
    engine.start()
    with pytest.raises(sdjax.RequestError, match="61"):
        engine.wait_until_ready()
    assert not engine.ready.is_set()
    engine.drain(0.0)


def test_a_store_that_fails_for_a_while_stops_nobody(store, start, submit, ended, monkeypatch):
    start()
    waiting, failures = store.waiting, iter(range(2))

    def unwell():
        if next(failures, None) is not None:
            raise OSError("disk full")
        return waiting()

    monkeypatch.setattr(store, "waiting", unwell)
    job = submit()
    assert ended([job])[0].name == "complete"
