"""The real `openai` client, sync and async, against the server."""

import asyncio
import base64
import io
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from PIL import Image

from tests.serve.conftest import KEY, picture, wait_for


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def opened(text):
    return Image.open(io.BytesIO(base64.b64decode(text)))


def last_request(server):
    (job,) = server.client.get("/v1/jobs", params={"limit": 1}).json()["jobs"]
    return job["request"]


def test_a_picture_is_generated(client, server):
    began = time.time()
    answer = client.images.generate(prompt="a red circle", model="tiny")
    assert began - 1 <= answer.created <= time.time()
    assert opened(answer.data[0].b64_json).size == (64, 64)
    assert answer.size == "64x64"
    assert answer.output_format == "png"
    assert last_request(server)["prompt"] == "a red circle"


def test_n_pictures_of_a_size_come_in_a_format(client):
    answer = client.images.generate(prompt="a circle", n=3, size="72x128", output_format="webp", output_compression=50)
    pictures = [opened(entry.b64_json) for entry in answer.data]
    assert [(each.size, each.format) for each in pictures] == [((72, 128), "WEBP")] * 3


def test_compression_makes_a_smaller_file(client):
    fields = {"prompt": "a circle", "size": "512x512", "output_format": "jpeg", "extra_body": {"seed": 3, "steps": 1}}
    small, large = (client.images.generate(output_compression=c, **fields).data[0].b64_json for c in (1, 100))
    assert len(small) < len(large)


def test_our_own_parameters_go_in_the_extra_body(client, server):
    extra = {"seed": 7, "steps": 2, "negative_prompt": "blue", "guidance_scale": 1.5, "sampler": "euler"}
    answer = client.images.generate(prompt="a circle", extra_body=extra)
    assert answer.seed == 7
    assert {name: last_request(server)[name] for name in extra} == extra


def test_parameters_without_a_meaning_here_are_taken(client):
    client.images.generate(
        prompt="a circle", quality="high", style="vivid", user="me", background="opaque", moderation="low", size="auto"
    )


BLANK = ("model", "n", "size", "quality", "style", "user", "background", "response_format", "output_format", "stream")
OURS = ("negative_prompt", "steps", "num_inference_steps", "guidance_scale", "seed", "sampler", "schedule")


def test_what_a_client_leaves_blank_is_not_given(client, server):
    blank = dict.fromkeys((*BLANK, *OURS, "moderation", "input_fidelity", "output_compression", "partial_images"), "")
    body = server.client.post("/v1/images/generations", json={**blank, "prompt": "a circle"})
    assert body.status_code == 200, body.text
    form = {**blank, "prompt": "a circle", "strength": ""}
    edit = server.client.post("/v1/images/edits", files={"image": picture()}, data=form)
    assert edit.status_code == 200, edit.text
    assert len(edit.json()["data"]) == 1


def test_a_seed_of_minus_one_is_drawn(client, server):
    seeds = {client.images.generate(prompt="a circle", extra_body={"seed": -1}).seed for _ in range(3)}
    assert len(seeds) == 3
    form = {"prompt": "a circle", "seed": "-1", "num_inference_steps": "3"}
    answer = server.client.post("/v1/images/edits", files={"image": picture()}, data=form)
    assert answer.json()["seed"] >= 0
    assert last_request(server)["steps"] == 3


def test_steps_have_the_name_that_diffusers_gives_them(client, server):
    extra = {"num_inference_steps": 5, "schedule": "karras", "sampler": "euler"}
    client.images.generate(prompt="a circle", extra_body=extra)
    assert (last_request(server)["steps"], last_request(server)["schedule"]) == (5, "karras")


@pytest.mark.parametrize(
    "fields", [{"style": "natural"}, {"moderation": "low"}, {"input_fidelity": "high"}, {"quality": "hd"}], ids=str
)
def test_what_has_no_meaning_here_is_taken_by_both_routes(client, fields):
    assert client.images.generate(prompt="a circle", extra_body=fields).data
    assert client.images.edit(image=picture(), prompt="a circle", extra_body=fields).data


def test_a_name_that_the_operator_gives_the_model_is_drawn_with_and_listed(serve):
    server = serve(alias=["gpt-image-1", "owner/dall-e-3"])
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny", "gpt-image-1", "owner/dall-e-3"]
    assert client.models.retrieve("owner/dall-e-3").id == "owner/dall-e-3"
    for name in ("gpt-image-1", "owner/dall-e-3", "tiny", ""):
        assert client.images.generate(model=name, prompt="a circle").data
    assert server.wait(server.submit(model="gpt-image-1", steps=1), "complete")["request"]["model"] == "tiny"
    with pytest.raises(openai.BadRequestError, match="dall-e-2"):
        client.images.generate(model="dall-e-2", prompt="a circle")


def test_any_model_is_drawn_with_where_the_operator_wants_it(serve):
    server = serve(any_model=True)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    assert client.images.generate(model="dall-e-2", prompt="a circle").data
    assert client.images.edit(model="gpt-image-1", image=picture(), prompt="a circle").data
    assert client.models.retrieve("dall-e-2").id == "dall-e-2"
    body = {"operation": "image_generation", "prompt": "a circle", "model": "dall-e-2"}
    assert server.client.post("/v1/jobs", json=body).status_code == 409  # a hive relies on the model that it names


def test_a_word_that_the_model_does_not_know_is_in_the_answer(client, server):
    answer = client.images.generate(prompt="a dog")
    assert answer.warnings == ["this model does not know: dog"]
    (job,) = server.client.get("/v1/jobs", params={"limit": 1}).json()["jobs"]
    assert job["warnings"] == answer.warnings
    assert "warnings" not in job["request"]
    assert "warnings" not in server.client.post("/v1/images/generations", json={"prompt": "a circle"}).json()


def test_a_url_opens_without_the_key_for_a_while(serve):
    server = serve(api_key=[KEY])
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY)
    (picture,) = client.images.generate(prompt="a circle", response_format="url").data
    assert httpx.get(picture.url).content.startswith(b"\x89PNG")
    assert httpx.get(picture.url.partition("?")[0]).status_code == 401


def test_a_url_leads_to_the_picture(client):
    answer = client.images.generate(prompt="a circle", response_format="url")
    assert httpx.get(answer.data[0].url).content.startswith(b"\x89PNG")


def test_partial_pictures_are_streamed(client):
    events = list(
        client.images.generate(prompt="a circle", stream=True, partial_images=2, n=2, extra_body={"steps": 9})
    )
    assert [event.type for event in events] == [
        *["image_generation.partial_image"] * 2,
        *["image_generation.completed"] * 2,
    ]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    assert opened(events[-1].b64_json).size == (64, 64)
    assert events[-1].usage.total_tokens == 0


def test_a_stream_without_partial_pictures_is_one_event(client):
    (event,) = client.images.generate(prompt="a circle", stream=True, partial_images=0, output_format="jpeg")
    assert event.type == "image_generation.completed"
    assert opened(event.b64_json).format == "JPEG"


def test_the_bytes_of_a_stream_have_no_ids(server):
    body = {"prompt": "a circle", "stream": True, "partial_images": 3, "steps": 8, "output_format": "webp"}
    answer = server.client.post("/v1/images/generations", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = answer.text.split("\n")
    assert {line.partition(":")[0] for line in lines if line} == {"event", "data"}
    assert sum(line.startswith("event: image_generation.partial_image") for line in lines) == 3


def test_the_asynchronous_client_works_too(server):
    async def draw():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            pictures = await asyncio.gather(*(client.images.generate(prompt=f"number {i}") for i in range(5)))
            stream = await client.images.generate(prompt="a circle", stream=True, partial_images=1)
            return pictures, [event.type async for event in stream]

    pictures, events = asyncio.run(draw())
    assert all(opened(answer.data[0].b64_json).size == (64, 64) for answer in pictures)
    assert events == ["image_generation.partial_image", "image_generation.completed"]


def test_an_edit_without_a_mask_transforms_the_picture(client, server):
    answer = client.images.edit(image=picture(128, 96), prompt="a square", extra_body={"strength": 0.3, "seed": 1})
    assert opened(answer.data[0].b64_json).size == (128, 96)
    request = last_request(server)
    assert (request["operation"], request["strength"], request["seed"]) == ("image_transform", 0.3, 1)


def test_a_masks_transparent_pixels_are_repainted(client, server):
    mask = Image.new("RGBA", (64, 64), (255, 255, 255, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 32, 64))
    mask.putpixel((40, 10), (0, 0, 0, 1))
    file = io.BytesIO()
    mask.save(file, "PNG")
    client.images.edit(image=picture(), mask=file.getvalue(), prompt="a square", n=2)
    request = last_request(server)
    assert (request["operation"], request["strength"], request["num_images"]) == ("image_inpaint", 1.0, 2)
    painted = Image.open(io.BytesIO(server.store.blob(request["mask_image"]["blob"])))
    assert painted.mode == "L"
    assert painted.getpixel((0, 0)) == 255
    assert painted.getpixel((31, 63)) == 255
    assert painted.getpixel((32, 0)) == 0
    assert painted.getpixel((40, 10)) == 0


def test_an_edit_is_drawn_at_the_size_that_is_asked_for(client):
    answer = client.images.edit(image=[picture(200, 100)], prompt="a square", size="64x96", response_format="b64_json")
    assert opened(answer.data[0].b64_json).size == (64, 96)


def test_an_edit_is_streamed(client):
    events = list(client.images.edit(image=picture(), prompt="a square", stream=True, partial_images=1))
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]


def test_models_are_listed(client):
    (served,) = client.models.list().data
    assert (served.id, served.object, served.owned_by) == ("tiny", "model", "sdjax")
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="no model"):
        client.models.retrieve("owner/other")


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("size", {"size": "0x0"}),
        ("size", {"size": "512"}),
        ("size", {"size": "512X512"}),
        ("size", {"size": "512×512"}),
        ("size", {"size": "65x64"}),
        ("size", {"size": "4096x4096"}),
        ("size", {"size": "-64x64"}),
        ("n", {"n": 0}),
        ("n", {"n": 9}),
        ("n", {"n": "2"}),
        ("model", {"model": "dall-e-3"}),
        ("background", {"background": "transparent"}),
        ("output_format", {"output_format": "gif"}),
        ("output_compression", {"output_compression": 50}),
        ("output_compression", {"output_compression": 101, "output_format": "jpeg"}),
        ("partial_images", {"partial_images": 4, "stream": True}),
        ("partial_images", {"partial_images": 1}),
        ("response_format", {"response_format": "url", "stream": True}),
        ("response_format", {"response_format": {"type": "b64_json"}}),
        ("stream", {"stream": "yes"}),
        ("prompt", {"prompt": ""}),
        ("prompt", {"prompt": ["a", "b"]}),
        ("quality", {"quality": "best"}),
        ("steps", {"extra_body": {"steps": 0}}),
        ("seed", {"extra_body": {"seed": -2}}),
        ("num_inference_steps", {"extra_body": {"num_inference_steps": 0}}),
        ("num_inference_steps", {"extra_body": {"num_inference_steps": 5, "steps": 6}}),
        ("schedule", {"extra_body": {"schedule": "linear"}}),
        ("style", {"style": "oil"}),
        ("frames", {"extra_body": {"frames": ""}}),
        ("negative_prompt", {"extra_body": {"negative_prompt": "x" * 10_001}}),
        ("frames", {"extra_body": {"frames": 5}}),
    ],
    ids=str,
)
def test_what_can_not_be_honoured_is_an_error_that_names_the_parameter(client, param, fields):
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(**{"prompt": "a circle", **fields})
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"
    assert set(caught.value.body) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("image", {"image": b"no picture"}),
        ("image", {"image": [picture(), picture()]}),
        ("image", {"image": [picture()] * 5}),
        ("image", {"image": [picture()] * 16}),
        ("image", {"image": [picture()] * 40}),
        ("mask", {"mask": picture(mode="L")}),
        ("mask", {"mask": b"no picture"}),
        ("size", {"size": "100"}),
        ("n", {"n": 0}),
        ("n", {"extra_body": {"n": "two"}}),
        ("steps", {"extra_body": {"steps": "NaN"}}),
        ("guidance_scale", {"extra_body": {"guidance_scale": "nan"}}),
        ("input_fidelity", {"input_fidelity": "best"}),
        ("style", {"extra_body": {"style": "oil"}}),
        ("prompt", {"prompt": ""}),
        ("strength", {"extra_body": {"strength": 1.5}}),
    ],
    ids=lambda value: str(value)[:50],
)
def test_an_edit_that_can_not_be_honoured_names_the_parameter(client, param, fields):
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.edit(**{"image": picture(), "prompt": "a square", **fields})
    assert caught.value.param == param


def test_a_form_that_is_broken_is_400(server):
    for kind, content in (
        ("application/json", b"{}"),
        ("multipart/form-data", b""),
        ("multipart/form-data; boundary=x", b"nonsense"),
        ("multipart/form-data; boundary=x", b"--x\r\nContent-Disposition: form-data\r\n\r\n\r\n--x--"),
        ("multipart/form-data; boundary=x", b'--x\r\nContent-Disposition: form-data; name="image"\r\n\r\na\r\n--x--'),
    ):
        answer = server.client.post("/v1/images/edits", content=content, headers={"Content-Type": kind})
        assert answer.status_code == 400, (kind, content)
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    twice = server.client.post("/v1/images/edits", files=[("image", picture())], data={"prompt": ["a", "b"]})
    assert twice.json()["error"]["param"] == "prompt"


def test_every_error_has_the_shape_that_clients_read(server):
    for method, path, status in (
        ("GET", "/v1/images/generations", 405),
        ("POST", "/v1/images/variations", 404),
        ("GET", "/v1/models/none", 404),
        ("POST", "/v1/models", 405),
    ):
        answer = server.client.request(method, path)
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert server.client.post("/v1/chat/completions").json()["error"]["message"]


def test_a_job_that_fails_is_an_error(client):
    with pytest.raises(openai.InternalServerError, match="NaN"):
        client.images.generate(prompt="fail")
    with pytest.raises(openai.APIError, match="NaN"):
        list(client.images.generate(prompt="fail", stream=True))


def test_a_failed_or_cancelled_job_is_not_tried_again(serve):
    server = serve()
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=2)
    with pytest.raises(openai.InternalServerError):
        client.images.generate(prompt="fail", extra_body={"steps": 1})
    server.engine.go.clear()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.images.generate, prompt="a circle")
        wait_for(lambda: server.store.counts()["running"] == 1)
        (job, _) = server.client.get("/v1/jobs").json()["jobs"]
        assert server.client.delete(f"/v1/jobs/{job['job_id']}").status_code == 200
        with pytest.raises(openai.APIStatusError, match="cancelled") as caught:
            waiting.result(120)
    assert caught.value.status_code == 410
    assert sum(server.store.counts().values()) == 2


def test_a_wrong_key_is_an_authentication_error(serve):
    server = serve(api_key=[KEY])
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()
    assert openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY).models.list().data


@pytest.mark.parametrize("stream", [False, True])
def test_the_work_of_a_client_that_leaves_is_cancelled(serve, stream):
    server = serve(step_seconds=0.05)
    body = b'{"prompt": "a circle", "steps": 150, "stream": %s}' % (b"true" if stream else b"false")
    port = int(server.url.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port)) as leaving:
        head = b"POST /v1/images/generations HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n" % len(body)
        leaving.sendall(head + body)
        wait_for(lambda: server.store.counts()["running"] == 1)
    wait_for(lambda: server.store.counts()["cancelled"] == 1)
    job_id = server.submit(steps=1)
    assert server.wait(job_id, "complete")
