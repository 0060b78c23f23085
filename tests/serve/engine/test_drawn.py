"""Whoever shares a batch, each job gets the library's picture."""

import base64
import io
import random
import time

import numpy as np
from PIL import Image

from sdjax import metadata
from sdjax.serve import drawing, previews
from sdjax.serve.store import FINAL
from tests.loading import lora_files
from tests.native import FACTOR
from tests.serve.engine.jobs import PROMPT, REQUEST, drawn_by_library, pixels


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
    rows = [row for each in asked for row in drawing.prepare(pipe, "", drawing.requests(pipe, None, each))]
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


def test_a_job_of_more_pictures_than_slots_is_drawn_in_parts(pipe, store, start, submit, ended):
    engine = start(slots=2)
    job = submit(num_images=5, steps=4)
    most = 0
    while store.job(job.id).state not in FINAL:
        most = max(most, engine.stats().drawing)
    assert most <= 2
    for number in range(5):
        np.testing.assert_array_equal(pixels(store, job, number), drawn_by_library(pipe, job, number))


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
    final = np.asarray(
        Image.fromarray(pixels(store, job)).resize((64 // FACTOR, 64 // FACTOR), Image.Resampling.BOX), np.float32
    )
    assert shown.shape == (64 // FACTOR, 64 // FACTOR, 3)
    assert np.corrcoef(shown.ravel(), final.ravel())[0, 1] > 0.8
