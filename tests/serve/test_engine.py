"""What the engine promises, with the bundled model: whoever shares a batch, each job gets the library's picture."""

import base64
import hashlib
import io
import random
import resource
import threading
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import freeze, unfreeze
from PIL import Image

import sdjax
from sdjax import metadata
from sdjax.serve import drawing, previews, scheduling
from sdjax.serve import engine as engine_module
from sdjax.serve.buckets import bucket
from sdjax.serve.engine import GenerationEngine
from sdjax.serve.programs import Programs
from sdjax.serve.sqlite import SqliteStore
from sdjax.serve.store import FINAL
from tests.loading import lora_files

PROMPT = "a red circle above a blue square"
REQUEST = {
    "operation": "image_generation",
    "prompt": PROMPT,
    "negative_prompt": None,
    "steps": 6,
    "guidance_scale": 3.0,
    "seed": 1,
    "width": 64,
    "height": 64,
    "loras": [],
    "sampler": "ddim",
    "num_images": 1,
    "preview_every": 0,
    "response": "png",
}


@pytest.fixture(scope="module")
def pipe():
    return sdjax.Pipeline.from_pretrained()


@pytest.fixture
def store(tmp_path):
    store = SqliteStore(tmp_path / "store")
    yield store
    store.close()


@pytest.fixture
def start(pipe, store):
    """Start engines that end with the test. What one compiles serves the next."""
    engines = []

    def start_one(pipe=pipe, **options):
        engine = GenerationEngine(pipe, store, **{"batch_sizes": (1, 2), "slots": 4, **options})
        engines.append(engine)
        engine.start()
        engine.wait_until_ready()
        return engine

    yield start_one
    for engine in engines:
        engine.drain(0.0)


@pytest.fixture
def submit(store):
    def submit_one(pictures=None, **options):
        request = {**REQUEST, **options}
        blobs = {}
        for name, picture in (pictures or {}).items():
            file = io.BytesIO()
            picture.save(file, "PNG")
            digest = hashlib.sha256(file.getvalue()).hexdigest()
            request[name], blobs[digest] = {"blob": digest}, file.getvalue()
        return store.submit(request, bucket=bucket(request), blobs=blobs)

    return submit_one


@pytest.fixture
def ended(store):
    """Wait for jobs, and give their last events."""

    def wait_for(jobs, seconds=120):
        deadline = time.monotonic() + seconds
        while any(store.job(job.id).state not in FINAL for job in jobs):
            assert time.monotonic() < deadline, [store.job(job.id) for job in jobs]
            time.sleep(0.01)
        return [store.events(job.id)[-1] for job in jobs]

    return wait_for


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def pixels(store, job, number=0):
    return np.asarray(Image.open(io.BytesIO(store.image(job.id, number)[1])))


def drawn_by_library(pipe, job, number=0, **pictures):
    asked = job.request
    names = ("steps", "guidance_scale", "sampler", "width", "height")
    given = {name: asked[name] for name in names}
    if pictures:
        given["strength"] = asked["strength"]
    seed = asked["seed"] + number
    return np.asarray(pipe(asked["prompt"], asked["negative_prompt"], seed=seed, **given, **pictures).images[0])


def test_every_job_gets_the_librarys_picture_in_any_mix(pipe, store, start, submit, ended):
    """Joins at random times, many samplers and lengths, previews, several pictures, cancels, in batches of two."""
    start()
    rng = random.Random(0)
    samplers = ["ddim", "euler_a", "dpmpp_2m", "heun", "dpmpp_sde", "lcm", "unipc", "pndm", "ddpm"]
    jobs, cancelled = [], []
    for i in range(2 * len(samplers)):
        jobs.append(
            submit(
                seed=100 * i,
                sampler=samplers[i % len(samplers)],
                steps=rng.choice([3, 5, 8, 13]),
                guidance_scale=rng.choice([0.0, 3.0, 5.5]),
                negative_prompt=rng.choice([None, "green"]),
                num_images=rng.choice([1, 1, 1, 2]),
                preview_every=rng.choice([0, 0, 2]),
            )
        )
        if i % 9 == 4:
            cancelled.append(submit(steps=100))
        time.sleep(rng.uniform(0, 0.1))
        if i % 9 == 7:
            store.cancel(cancelled[-1].id)
    ended(jobs)
    assert [store.job(job.id).state for job in cancelled] == ["cancelled"] * len(cancelled)
    for job in jobs:
        assert store.job(job.id).state == "complete", store.events(job.id)[-1]
        assert store.job(job.id).images == job.request["num_images"]
        for number in range(job.request["num_images"]):
            np.testing.assert_array_equal(pixels(store, job, number), drawn_by_library(pipe, job, number))


def test_a_seed_gives_the_same_latents_in_any_batch(pipe):
    asked = [{**REQUEST, "seed": seed, "steps": 4 + seed, "guidance_scale": 2.0 + seed} for seed in range(2)]
    rows = [drawing.prepare(pipe, "", 0, *drawing.requests(pipe, None, each)) for each in asked]
    together, finite = drawing.walk(pipe, rows, 2, 4)
    assert finite == [True, True]
    for row, batched in zip(rows, together, strict=True):
        for _ in range(4):
            (row,), _ = drawing.walk(pipe, [row], 1, 1)
        np.testing.assert_array_equal(row.batch.state, batched.batch.state)


def test_pictures_start_from_pictures_and_masks(pipe, store, start, submit, ended):
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8))
    mask = Image.fromarray(np.pad(np.full((32, 64), 255, np.uint8), [(0, 32), (0, 0)]))
    start()
    moved = submit({"input_image": photo}, operation="image_transform", strength=0.5)
    painted = submit({"init_image": photo, "mask_image": mask}, operation="image_inpaint", strength=1.0)
    untouched = submit({"input_image": photo}, operation="image_transform", strength=0.0)
    ended([moved, painted, untouched])
    np.testing.assert_array_equal(pixels(store, moved), drawn_by_library(pipe, moved, image=photo))
    np.testing.assert_array_equal(pixels(store, painted), drawn_by_library(pipe, painted, image=photo, mask=mask))
    np.testing.assert_array_equal(pixels(store, painted)[32:], np.asarray(photo)[32:])
    np.testing.assert_array_equal(pixels(store, untouched), drawn_by_library(pipe, untouched, image=photo))
    steps = [event.data["total"] for event in store.events(moved.id) if event.name == "progress"]
    assert steps
    assert set(steps) == {3}


def test_jobs_with_and_without_an_adapter_are_drawn_at_once(pipe, store, start, submit, ended, tmp_path):
    endings = {"unet": ("attn2.to_q", "attn2.to_v", "conv1")}
    layers = lora_files.random_layers(pipe.params, endings, seed=3)
    adapter = lora_files.write(lora_files.new_diffusers(layers), tmp_path / "style.v1.5.safetensors")
    start()
    loras = [{"path": str(adapter), "strength": 0.8}]
    jobs = [submit(seed=i // 2, steps=8, loras=loras if i % 2 else []) for i in range(4)]
    ended(jobs)
    for i, job in enumerate(jobs):
        asked = {name: job.request[name] for name in ("seed", "steps", "guidance_scale", "sampler")}
        drawn = pipe(PROMPT, loras=[(adapter, 0.8)] if i % 2 else [], **asked)
        np.testing.assert_array_equal(pixels(store, job), np.asarray(drawn.images[0]))
    assert np.any(pixels(store, jobs[0]) != pixels(store, jobs[1]))


def test_after_ready_nothing_is_compiled(start, submit, ended):
    engine = start()
    photo = Image.new("RGB", (64, 64), "red")
    before = engine.stats().compiles
    jobs = [
        submit(),
        submit(prompt="a large green star under a black ring", steps=9, sampler="heun", guidance_scale=7.0),
        submit(guidance_scale=0.0, num_images=3, preview_every=2),
        submit({"input_image": photo}, operation="image_transform", strength=0.7),
        submit({"init_image": photo, "mask_image": photo.convert("L")}, operation="image_inpaint", strength=0.9),
    ]
    ended(jobs)
    assert engine.stats().compiles == before


def test_a_story_tells_of_steps_in_order_and_ends_with_timings(store, start, submit, ended):
    start()
    job = submit(steps=40, seed=2**64 - 1, num_images=2)
    (last,) = ended([job])
    events = store.events(job.id)
    steps = [event.data["step"] for event in events if event.name == "progress"]
    assert steps == sorted(set(steps))
    assert steps[-1] == 40
    assert all(event.data["total"] == 40 for event in events if event.name == "progress")
    assert next(event for event in events if event.data.get("step") == 40).data["percent"] == 100.0
    assert last.data["seeds"] == [2**64 - 1, 0]
    assert last.data["seed"] == 2**64 - 1
    assert set(last.data["timings"]) == {"queued", "prepare", "denoise", "decode", "encode"}
    assert min(last.data["timings"].values()) >= 0, last.data["timings"]
    assert store.job(job.id).timings == last.data["timings"]


def test_a_png_carries_the_parameters_and_other_formats_are_what_they_say(store, start, submit, ended):
    start()
    words = "テスト🌸\nSteps: 9, Seed: 1"
    jobs = [submit(response=kind, prompt=words, negative_prompt="blue, green") for kind in ("png", "jpeg", "webp")]
    ended(jobs)
    for job, kind in zip(jobs, ("PNG", "JPEG", "WEBP"), strict=True):
        picture = Image.open(io.BytesIO(store.image(job.id, 0)[1]))
        assert (picture.format, picture.size) == (kind, (64, 64))
    text = Image.open(io.BytesIO(store.image(jobs[0].id, 0)[1])).info["parameters"]
    said = metadata.from_text(text)
    assert (said["prompt"], said["negative_prompt"], said["seed"], said["steps"]) == (words, "blue, green", 1, 6)


def test_what_was_measured_tells_when_a_waiting_job_will_be_complete(store, start, submit, ended):
    engine = start(slots=2)
    jobs = [submit(steps=30, seed=seed) for seed in range(6)]
    wait_until(lambda: sum(event.name == "progress" for event in store.events(jobs[0].id)) > 1)
    stats, began = engine.stats(), time.monotonic()
    waits = [stats.eta_leased(jobs[0].id), stats.eta_queued(store.ahead(jobs[5].id))]
    ended(jobs)
    assert 0 < waits[0] < waits[1]
    assert 0.4 < (time.monotonic() - began) / waits[1] < 2.5
    assert engine.stats().eta_leased(jobs[5].id) is None


def test_slices_steps_and_rows_are_counted(start, submit, ended):
    engine = start(slots=2)
    before = engine.stats()
    ended([submit(steps=6), submit(steps=10, num_images=2)])
    stats = engine.stats()
    pictures_steps = 6 + 2 * 10
    assert stats.steps - before.steps <= pictures_steps <= 2 * (stats.steps - before.steps)
    assert 0 < stats.slices - before.slices <= stats.rows - before.rows <= stats.places - before.places
    assert stats.slice_seconds > before.slice_seconds
    assert stats.leased == {}


def test_previews_come_when_asked_for_and_grow_like_the_picture(store, start, submit, ended):
    start()
    job = submit(steps=20, preview_every=6, seed=5)
    ended([job])
    told = [event.data for event in store.events(job.id) if event.name == "preview"]
    assert [preview["step"] for preview in told] == [6, 12, 18]
    assert [preview["percent"] for preview in told] == [30.0, 60.0, 90.0]
    assert {preview["format"] for preview in told} == {"png"}
    shown = [np.asarray(Image.open(io.BytesIO(base64.b64decode(preview["image"]))), np.float32) for preview in told]
    final = pixels(store, job).astype(np.float32)
    distances = [np.abs(picture - final).mean() for picture in shown]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 5
    names = [event.name for event in store.events(job.id)]
    assert names[-1] == "complete"


def test_previews_of_large_pictures_are_a_guess_from_the_latents(store, start, submit, ended, monkeypatch):
    monkeypatch.setattr(previews, "DECODED", 0)
    start()
    job = submit(steps=20, preview_every=18, seed=5)
    ended([job])
    (preview,) = [event.data for event in store.events(job.id) if event.name == "preview"]
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(preview["image"]))), np.float32)
    final = np.asarray(Image.fromarray(pixels(store, job)).resize((16, 16), Image.Resampling.BOX), np.float32)
    assert shown.shape == (16, 16, 3)
    assert np.corrcoef(shown.ravel(), final.ravel())[0, 1] > 0.8


def test_a_cancelled_job_leaves_at_once_and_its_neighbours_do_not_notice(pipe, store, start, submit, ended):
    engine = start()
    waits = []
    for i in range(3):
        neighbour, job = submit(seed=i, steps=40), submit(steps=150)
        wait_until(lambda job=job: any(event.name == "progress" for event in store.events(job.id)))
        gone = engine.stats().ended["gone"]
        began = time.monotonic()
        assert store.cancel(job.id).state == "cancelled"
        wait_until(lambda gone=gone: engine.stats().ended["gone"] > gone)
        waits.append(time.monotonic() - began)
        (last,) = ended([neighbour])
        assert last.name == "complete"
        np.testing.assert_array_equal(pixels(store, neighbour), drawn_by_library(pipe, neighbour))
        assert [event.name for event in store.events(job.id)][-1] == "cancelled"
    assert sorted(waits)[1] < 2 * scheduling.SLICE_SECONDS + engine_module.TELL_SECONDS


@pytest.mark.parametrize("times", [25, pytest.param(200, marks=pytest.mark.slow)])
def test_a_cancel_near_the_last_step_ends_in_one_way(store, start, submit, ended, times):
    start()
    for i in range(times):
        job = submit(steps=2, guidance_scale=0.0, seed=i)
        time.sleep(0.003 * (i % 25))
        answer = store.cancel(job.id)
        ended([job])
        names = [event.name for event in store.events(job.id)]
        assert names.count("complete") + names.count("cancelled") == 1
        assert names[-1] == store.job(job.id).state == answer.state


def test_a_waiting_job_that_is_cancelled_never_begins(store, start, submit, ended):
    start(slots=1)
    first, second, third = submit(steps=60), submit(steps=5), submit(steps=5)
    wait_until(lambda: store.job(first.id).state == "running")
    store.cancel(second.id)
    assert [event.name for event in ended([first, third])] == ["complete", "complete"]
    assert store.job(second.id).started is None


def test_a_job_of_more_pictures_than_slots_is_drawn_in_parts(pipe, store, start, submit, ended):
    engine = start(slots=2)
    job = submit(num_images=5, steps=4)
    most = 0
    while store.job(job.id).state not in FINAL:
        most = max(most, engine.stats().drawing)
    assert most <= 2
    for number in range(5):
        np.testing.assert_array_equal(pixels(store, job, number), drawn_by_library(pipe, job, number))


def test_a_new_job_joins_those_that_run(store, start, submit, ended):
    start()
    long = submit(steps=150)
    wait_until(lambda: any(event.name == "progress" for event in store.events(long.id)))
    short = submit(steps=2)
    ended([short])
    assert store.job(long.id).state == "running"
    ended([long])


def test_a_lone_bucket_does_not_starve_behind_a_flood(store, start, submit, ended, monkeypatch):
    monkeypatch.setattr(scheduling, "BUCKETS_AT_ONCE", 1)
    monkeypatch.setattr(scheduling, "PATIENCE", 0.2)
    start(slots=2)
    flood = [submit(seed=i, steps=10) for i in range(4)]
    lone = submit(guidance_scale=0.0)
    flood += [submit(seed=i, steps=10) for i in range(4, 20)]
    ended([lone])
    assert sum(store.job(job.id).state == "queued" for job in flood) >= 6
    ended(flood)


def test_numbers_that_are_not_finite_are_an_error_that_names_the_step(pipe, store, start, submit, ended, monkeypatch):
    prepare = drawing.prepare

    def poisoned(pipe, job_id, number, request):
        row = prepare(pipe, job_id, number, request)
        if request.seeds != (13,):
            return row
        table = row.batch.table
        return row._replace(batch=row.batch._replace(table=table._replace(B=table.B.at[0, 4].set(jnp.nan))))

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
    assert (events[1].data["code"], events[1].data["message"]) == ("internal", "this one is cursed")
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


def test_a_job_that_lost_its_process_is_drawn_alone(store, start, submit, ended):
    first, suspect, third = (submit(seed=seed, steps=30) for seed in range(3))
    store.cancel(first.id)
    store.lease(None, 1, owner="a process that dies", seconds=0)
    fourth = submit(seed=4, steps=30)
    engine = start()
    most = 0
    while store.job(suspect.id).state not in FINAL:
        if store.job(suspect.id).state == "running":
            most = max(most, engine.stats().drawing)
    ended([third, fourth])
    assert most <= 1
    assert (store.job(suspect.id).state, store.job(suspect.id).attempts) == ("complete", 2)
    assert max(store.job(job.id).started for job in (third, fourth)) >= store.job(suspect.id).finished - 0.5


def test_draining_lets_the_running_finish_and_gives_the_waiting_back(store, start, submit):
    engine = start(slots=1)
    running, waiting = submit(steps=80), submit()
    wait_until(lambda: any(event.name == "progress" for event in store.events(running.id)))
    engine.drain(60)
    assert store.job(running.id).state == "complete"
    assert (store.job(waiting.id).state, store.job(waiting.id).attempts) == ("queued", 0)
    engine.drain(0)


def test_what_does_not_finish_in_time_is_given_back_and_drawn_by_the_next(pipe, store, start, submit, ended):
    engine = start()
    jobs = [submit(steps=40, seed=seed) for seed in range(3)]
    wait_until(lambda: any(event.name == "progress" for event in store.events(jobs[0].id)))
    began = time.monotonic()
    engine.drain(0.0)
    assert time.monotonic() - began < 5
    assert [store.job(job.id).state for job in jobs] == ["queued"] * 3
    assert [store.job(job.id).attempts for job in jobs] == [0] * 3
    start()
    ended(jobs)
    for job in jobs:
        np.testing.assert_array_equal(pixels(store, job), drawn_by_library(pipe, job))


def test_a_size_that_was_not_foreseen_is_compiled_beside_the_others(pipe, store, start, submit, ended, monkeypatch):
    """It takes longer than a lease, and those that run go on meanwhile."""
    start(lease_seconds=0.8)
    compile_program, go = Programs.compile, threading.Event()

    def slow_compiler(self, key, row, size):
        assert go.wait(300)
        compile_program(self, key, row, size)

    monkeypatch.setattr(Programs, "compile", slow_compiler)
    wide = submit(width=48, height=32, guidance_scale=0.0)
    wait_until(lambda: store.job(wide.id).state == "running")
    others = [submit(seed=seed) for seed in range(3)]
    ended(others)
    time.sleep(1.0)
    assert store.job(wide.id).state == "running"
    go.set()
    ended([wide], seconds=240)
    assert (store.job(wide.id).state, store.job(wide.id).attempts) == ("complete", 1)
    assert pixels(store, wide).shape == (32, 48, 3)
    np.testing.assert_array_equal(pixels(store, wide), drawn_by_library(pipe, wide))


def test_an_engine_that_cannot_get_ready_says_why(pipe, store, monkeypatch):
    engine = GenerationEngine(pipe, store, sizes=[(60, 61)])
    engine.start()
    with pytest.raises(sdjax.RequestError, match="61"):
        engine.wait_until_ready()
    assert not engine.ready.is_set()
    engine.drain(0.0)


def test_an_engine_can_be_drained_before_it_is_ready(pipe, store, submit):
    job = submit()
    engine = GenerationEngine(pipe, store)
    engine.start()
    engine.drain(0.0)
    engine.wait_until_ready()
    assert store.job(job.id).state == "queued"


def test_an_engine_whose_jobs_were_taken_stops_drawing_them(store, start, submit, ended, monkeypatch):
    engine = start(lease_seconds=0.3)
    monkeypatch.setattr(engine._leases, "tell", lambda events: None)  # frozen, as the store sees it
    job = submit(steps=150)
    wait_until(lambda: store.job(job.id).state == "running")
    time.sleep(0.4)
    (taken,) = store.lease(None, 1, owner="other", seconds=60)
    assert taken.job.id == job.id
    monkeypatch.undo()
    wait_until(lambda: engine.stats().ended["gone"] == 1)
    assert store.finish(job.id, taken.fence, [("png", b"the other's")], data={})
    assert store.image(job.id, 0) == ("png", b"the other's")
    assert [event.name for event in store.events(job.id)].count("complete") == 1


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


@pytest.mark.slow
def test_five_hundred_jobs_leave_no_memory_behind(store, start, submit, ended):
    engine = start()

    def draw(count):
        jobs = []
        for i in range(count):
            wrong = {"sampler": "no such"} if i % 10 == 3 else {}
            jobs.append(submit(seed=i, steps=1, guidance_scale=0.0, **wrong))
            if i % 10 == 7:
                store.cancel(jobs[-1].id)
            if i % 50 == 49:
                ended(jobs)
        ended(jobs)

    draw(150)
    before, threads = memory(), threading.active_count()
    draw(350)
    assert memory() - before < 40e6
    assert threading.active_count() <= threads
    stats = engine.stats()
    assert stats.ended["error"] == 50
    assert stats.ended["complete"] + stats.ended["gone"] <= 450
    assert (stats.drawing, stats.pending, stats.finishing) == (0, 0, 0)


def memory():
    """Resident bytes; where the system doesn't say, the most that there ever were."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
