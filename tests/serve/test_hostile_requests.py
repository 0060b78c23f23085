"""Wrong values, broken pictures, broken JSON: each gets its status and names its field, and the server goes on."""

import io
import json
import resource
import socket
import struct
import zlib

import pytest
from PIL import Image

from sdjax.serve import bodies
from sdjax.serve.pictures import PictureError, read_picture
from tests.serve.conftest import as_base64, picture

LONG = "x" * 10_000_000
WRONG_NUMBERS = ("5", True, [], {}, "NaN", LONG)


def request(operation="image_generation", **fields):
    body = {"operation": operation, "prompt": "a red circle", "steps": 2}
    if operation == "image_transform":
        body["input_image"] = as_base64(picture())
    if operation == "image_inpaint":
        body |= {"init_image": as_base64(picture()), "mask_image": as_base64(picture())}
    return {**body, **fields}


def wrong_fields():
    """(field that is named, fields of the request), for each kind of wrong value."""
    yield from (("prompt", {"prompt": value}) for value in (None, "", "  \n", 5, True, [], {}, LONG, "\ud800"))
    yield from (("steps", {"steps": value}) for value in (*WRONG_NUMBERS, 0, -1, 151, 1.5, 10**400))
    yield from (("guidance_scale", {"guidance_scale": value}) for value in (*WRONG_NUMBERS, -0.1, 20.5, 10**400))
    yield from (("seed", {"seed": value}) for value in (*WRONG_NUMBERS, -1, 2**64, 1.5))
    for side in ("width", "height"):
        yield from ((side, {side: value}) for value in (*WRONG_NUMBERS, 0, -64, 56, 65, 2056, 64.5))
    yield from (("num_images", {"num_images": value}) for value in (*WRONG_NUMBERS, 0, -1, 9))
    yield from (("preview_every", {"preview_every": value}) for value in (*WRONG_NUMBERS, -1, 151))
    yield from (("sampler", {"sampler": value}) for value in (5, "", "Euler", "nonsense", LONG))
    yield from (("response", {"response": value}) for value in (5, "", "gif", "PNG", LONG))
    yield from (("negative_prompt", {"negative_prompt": value}) for value in (5, [], LONG))
    yield from (("model", {"model": value}) for value in (5, [], LONG))
    yield from (("hive_id", {"hive_id": value}) for value in (5, LONG))
    yield from (("loras", {"loras": value}) for value in ("x", {}, 5, [{"path": "a"}] * 9))
    yield ("loras.0", {"loras": ["x"]})
    yield ("loras.0.path", {"loras": [{"strength": 1.0}]})
    yield from (("loras.0.strength", {"loras": [{"path": "a", "strength": v}]}) for v in ("1", True, 1e9))
    yield from (("operation", {"operation": value}) for value in (None, "", 5, [], "image_upscale", LONG))
    yield ("promt", {"promt": "a slip"})
    yield ("strength", {"strength": 0.5})
    yield ("input_image", {"input_image": "eA=="})


def label(value):
    return str(value)[:40]


@pytest.mark.parametrize(("field", "wrong"), list(wrong_fields()), ids=label)
def test_a_wrong_value_is_refused_and_its_field_is_named(server, field, wrong):
    answer = server.client.post("/v1/jobs", content=json.dumps(request(**wrong)))
    assert answer.status_code == 422, answer.text
    error = answer.json()["error"]
    assert list(error) == ["code", "message", "field"]
    assert error["code"] == "invalid_field"
    assert error["field"] == field
    assert len(answer.content) < 1000


@pytest.mark.parametrize("field", ["steps", "guidance_scale", "seed", "width", "strength"])
@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400", "-1e400", "9" * 5000])
def test_a_number_that_is_not_finite_is_refused(server, field, number):
    body = request("image_transform" if field == "strength" else "image_generation", **{field: 0})
    text = json.dumps(body).replace(f'"{field}": 0', f'"{field}": {number}')
    answer = server.client.post("/v1/jobs", content=text)
    assert answer.status_code == 422
    assert answer.json()["error"]["field"] == field
    assert len(answer.content) < 1000


@pytest.mark.parametrize("field", ["operation", "prompt"])
def test_a_missing_field_is_named(server, field):
    body = request()
    del body[field]
    answer = server.client.post("/v1/jobs", json=body)
    assert answer.status_code == 422
    assert answer.json()["error"]["field"] == field


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "nonsense",
        "null",
        "[]",
        '"text"',
        "5",
        "NaN",
        "[" * 100_000,
        '{"prompt":' * 100_000,
        '{"prompt": ' + "[" * 5000 + "]" * 5000 + "}",
        b"\xff\xfe{}",
        b"\x00",
        b'{"prompt": "\xff"}',
        "operation=image_generation&prompt=x",
        "{'prompt': 'x'}",
        '{"prompt": "x"} {}',
        '{"prompt": "x",}',
    ],
    ids=label,
)
def test_a_body_that_is_no_json_object_is_400(server, text):
    answer = server.client.post("/v1/jobs", content=text)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["code"] == "not_json"
    assert len(answer.content) < 1000


def test_a_name_that_is_given_twice_is_refused(server):
    for text, field in (
        ('{"operation": "image_generation", "prompt": "a", "prompt": "b"}', "prompt"),
        ('{"operation": "image_generation", "prompt": "a", "loras": [{"path": "a", "path": "b"}]}', "path"),
    ):
        answer = server.client.post("/v1/jobs", content=text)
        assert answer.status_code == 422
        assert answer.json()["error"]["field"] == field


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of_size(width, height):
    """A PNG whose header promises a size, with next to no pixels behind it."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def animated(kind):
    file = io.BytesIO()
    frames = [Image.new("RGB", (64, 64), color) for color in ("red", "green")]
    frames[0].save(file, kind, save_all=True, append_images=frames[1:])
    return file.getvalue()


BAD_PICTURES = {
    "empty": b"",
    "text": b"hello",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"/>',
    "gif": picture(kind="GIF"),
    "tiff": picture(kind="TIFF"),
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n",
    "pdf": b"%PDF-1.4",
    "truncated png": picture(256, 256)[:-40],
    "truncated jpeg": picture(256, 256, "JPEG")[:-300],
    "truncated webp": picture(256, 256, "WEBP")[:-20],
    "header alone": picture()[:40],
    "zero-sized": png_of_size(0, 64),
    "zero pixels": png_of_size(0, 0),
    "one pixel": picture(1, 1),
    "100000x1": png_of_size(100_000, 1),
    "20000x20000": png_of_size(20_000, 20_000),
    "2^31-1": png_of_size(2**31 - 1, 2**31 - 1),
    "8000x8000": png_of_size(8000, 8000),
    "animated png": animated("PNG"),
    "animated webp": animated("WEBP"),
    "too thin": picture(8000, 64),
    "promises more than it has": png_of_size(512, 512),
}


@pytest.mark.parametrize("name", BAD_PICTURES)
@pytest.mark.parametrize("field", ["input_image", "mask_image"])
def test_a_picture_that_is_none_is_refused(server, name, field):
    operation = "image_transform" if field == "input_image" else "image_inpaint"
    if field == "mask_image" and name in ("too thin", "one pixel"):
        pytest.skip("a mask is stretched over its picture")
    answer = server.client.post("/v1/jobs", json=request(operation, **{field: as_base64(BAD_PICTURES[name])}))
    assert answer.status_code == 422, answer.text
    assert answer.json()["error"]["field"] == field
    assert len(answer.content) < 1000


def test_a_bomb_is_refused_before_it_is_decoded():
    rows = zlib.compressobj()
    data = b"".join(rows.compress(bytes(2501)) for _ in range(20_000)) + rows.flush()
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    assert len(bomb) < 100_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(PictureError, match="pixels"):
        read_picture(bomb)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB; decoded it has 400 MB


@pytest.mark.parametrize(
    "text",
    [
        "",
        "!!!!",
        "data:image/png,abc",
        "data:",
        "data:;base64,",
        "http://localhost/picture.png",
        "file:///etc/passwd",
        "/etc/passwd",
        "a",
        "=" * 1000,
        "é",
        5,
        None,
        ["a"],
        {"blob": "0" * 64},
    ],
    ids=label,
)
def test_what_is_no_base64_is_refused(server, text):
    answer = server.client.post("/v1/jobs", json=request("image_transform", input_image=text))
    assert answer.status_code == 422
    assert answer.json()["error"]["field"] == "input_image"


def test_base64_is_taken_in_any_dress(server):
    data = picture(64, 64, "PNG", color=(250, 251, 255))
    plain = as_base64(data)
    url_safe = plain.replace("+", "-").replace("/", "_")
    lines = "\r\n".join(plain[i : i + 76] for i in range(0, len(plain), 76))
    for text in (
        plain,
        f"data:image/png;base64,{plain}",
        f"DATA:image/png;charset=utf-8;base64,{plain}",
        lines,
        url_safe,
        plain.rstrip("="),
        f" {plain}\n",
    ):
        answer = server.client.post("/v1/jobs", json=request("image_transform", input_image=text))
        assert answer.status_code == 200, text[:40]
        blob = server.job(answer.json()["job_id"])["request"]["input_image"]["blob"]
        assert server.store.blob(blob) == data


def test_what_the_model_can_not_do_is_refused_before_the_job_waits(server):
    answer = server.client.post("/v1/jobs", json=request("image_transform", steps=3, strength=0.01))
    assert answer.status_code == 422
    assert answer.json()["error"]["field"] == "strength"
    assert "at least" in answer.json()["error"]["message"]


def test_a_photo_with_others_behind_it_is_taken_as_its_first(server):
    file = io.BytesIO()
    frames = [Image.new("RGB", (64, 64), color) for color in ("red", "green")]
    frames[0].save(file, "MPO", save_all=True, append_images=frames[1:])
    job_id = server.client.post("/v1/jobs", json=request("image_transform", input_image=as_base64(file.getvalue())))
    path = f"/v1/jobs/{job_id.json()['job_id']}/inputs/input_image"
    assert server.client.get(path).headers["content-type"] == "image/jpeg"


@pytest.mark.parametrize("turn", [0, 9, 99, 2**16 - 1])
def test_a_turn_that_there_is_not_is_none(server, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    body = request("image_transform", input_image=as_base64(picture(128, 64, "JPEG", exif=exif)))
    job = server.job(server.client.post("/v1/jobs", json=body).json()["job_id"])
    assert (job["request"]["width"], job["request"]["height"]) == (128, 64)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_pictures_of_every_mode_are_taken(server, mode):
    body = request("image_transform", input_image=as_base64(picture(mode=mode)))
    assert server.client.post("/v1/jobs", json=body).status_code == 200


def test_a_photo_that_says_it_is_turned_is_drawn_as_it_is_seen(server):
    exif = Image.Exif()
    exif[0x0112] = 6
    body = request("image_transform", input_image=as_base64(picture(128, 64, "JPEG", exif=exif)))
    job = server.job(server.client.post("/v1/jobs", json=body).json()["job_id"])
    assert (job["request"]["width"], job["request"]["height"]) == (64, 128)


@pytest.fixture(scope="module")
def with_loras(serve_all, tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    (folder / "sub").mkdir()
    (folder / "style.v1.5 é.safetensors").write_bytes(b"x")
    (folder / "sub" / "other.safetensors").write_bytes(b"x")
    outside = tmp_path_factory.mktemp("outside") / "secret.safetensors"
    outside.write_bytes(b"x")
    (folder / "link.safetensors").symlink_to(outside)
    (folder / "inner.safetensors").symlink_to(folder / "sub" / "other.safetensors")
    (folder / "linked").symlink_to(outside.parent)
    return serve_all(lora_dir=folder), outside


def test_adapters_of_the_folder_are_taken(with_loras):
    server, _ = with_loras
    loras = [{"path": "style.v1.5 é.safetensors", "strength": -0.5}, {"path": "sub/other.safetensors"}]
    request = server.job(server.submit(steps=1, loras=loras))["request"]
    assert request["loras"] == [loras[0], {**loras[1], "strength": 1.0}]


@pytest.mark.parametrize(
    "path",
    [
        "absent.safetensors",
        "../outside",
        "sub/../../outside",
        "/etc/passwd",
        ".",
        "./",
        "..",
        "",
        "\0",
        "a\\..\\b",
        "link.safetensors",
        "inner.safetensors",
        "linked/secret.safetensors",
        "x" * 255,
        "x/" * 120,
        "style.v1.5 é.safetensors/x",
    ],
)
def test_an_adapter_outside_the_folder_is_refused_before_the_job_waits(with_loras, path):
    server, _ = with_loras
    before = sum(server.store.counts().values())
    answer = server.client.post("/v1/jobs", json=request(loras=[{"path": path, "strength": 1.0}]))
    assert answer.status_code == 422, answer.text
    assert answer.json()["error"]["field"] == "loras.0.path"
    assert sum(server.store.counts().values()) == before


def test_an_adapter_by_its_absolute_path_is_refused_even_inside(with_loras):
    server, outside = with_loras
    folder = server.app.state.front.settings.lora_dir
    for path in (outside, folder / "sub" / "other.safetensors"):
        answer = server.client.post("/v1/jobs", json=request(loras=[{"path": str(path)}]))
        assert answer.status_code == 422


def test_adapters_of_a_prompt_are_taken_by_the_same_rules(with_loras):
    server, outside = with_loras
    names = ["absent", "../outside", f"{outside}", "link", "linked/secret", "sub/other:99", "sub/other:x"]
    prompt = "a red circle <lora:sub/other:0.5><lora:style.v1.5 é>" + "".join(f"<lora:{name}>" for name in names)
    job = server.job(server.submit(prompt, steps=1, loras=[{"path": "sub/other.safetensors", "strength": 1.0}]))
    taken = [("sub/other.safetensors", 1.0), ("sub/other", 0.5), ("style.v1.5 é", 1.0)]
    assert [(lora["path"], lora["strength"]) for lora in job["request"]["loras"]] == taken
    assert [line.partition(" is left out")[0] for line in job["warnings"]] == [f"<lora:{names[-1]}>"] + [
        f"<lora:{name}>" for name in names[:-1]
    ]
    assert not any(str(server.app.state.front.settings.lora_dir) in line for line in job["warnings"])
    answer = server.client.post("/v1/jobs", json=request(prompt="<lora:sub/other>" * 9))
    assert (answer.status_code, answer.json()["error"]["field"]) == (422, "prompt")


def test_without_a_folder_an_adapter_of_a_prompt_is_left_out_with_a_warning(server):
    job = server.job(server.submit("a star <lora:x:0.8>", steps=1))
    assert job["warnings"] == ["<lora:x:0.8> is left out: this server has no adapter folder"]
    assert job["request"]["loras"] == []


def test_adapters_need_a_folder(server):
    answer = server.client.post("/v1/jobs", json=request(loras=[{"path": "a"}]))
    assert answer.status_code == 422
    assert answer.json()["error"]["field"] == "loras.0.path"


def test_a_body_over_the_cap_is_refused_before_it_is_read(serve):
    server = serve(max_body=4096)
    port = int(server.url.rsplit(":", 1)[1])
    assert server.client.post("/v1/jobs", content=b" " * 5000).status_code == 413
    assert server.client.post("/v1/images/generations", content=b" " * 5000).json()["error"]["code"] == "too_large"
    # The client has sent nothing of the body yet.
    with socket.create_connection(("127.0.0.1", port)) as early:
        early.sendall(b"POST /v1/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99999999999999999999\r\n\r\n")
        assert early.recv(4096).startswith(b"HTTP/1.1 413")
    answer = server.client.post("/v1/jobs", content=iter([b" " * 1000] * 100))
    assert answer.status_code == 413
    assert answer.json()["error"] == {"code": "too_large", "message": answer.json()["error"]["message"], "field": None}
    assert server.client.post("/v1/jobs", json=request()).status_code == 200


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"Content-Length: 5\r\n\r\n{}", None),
        (b"Content-Length: -1\r\n\r\n{}", b"400"),
        (b"Content-Length: x\r\n\r\n{}", b"400"),
        (b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", b"400"),
        (b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", b"400"),
        (b"Content-Length: 1\r\n\r\n{}", b"400"),
    ],
)
def test_a_length_that_lies_disturbs_nobody(server, head, status):
    port = int(server.url.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port)) as liar:
        liar.settimeout(5)
        liar.sendall(b"POST /v1/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\n" + head)
        if status is None:
            liar.shutdown(socket.SHUT_WR)
        else:
            assert liar.recv(4096)[9:12] == status
    assert server.client.get("/health").status_code == 200


def test_a_body_that_does_not_arrive_is_given_up(server, monkeypatch):
    monkeypatch.setattr(bodies, "ARRIVES_WITHIN", 0.1)
    port = int(server.url.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port)) as slow:
        slow.settimeout(10)
        slow.sendall(b"POST /v1/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\n{")
        assert slow.recv(4096).startswith(b"HTTP/1.1 408")


def test_strange_paths_get_an_answer(server):
    for path in ("/%00", "/..%2f..%2fetc/passwd", "//", "/v1", "/v1/", "/v1/jobs/", "/%ff", "/page/../x", "/é"):
        answer = server.client.get(path)
        assert answer.status_code in (200, 307, 404), path
        if answer.status_code == 404:
            assert answer.json()["error"]["code"] == "not_found"
    for method in ("PUT", "PATCH", "TRACE", "BREW"):
        assert server.client.request(method, "/v1/jobs").status_code == 405


def test_after_all_that_the_server_still_draws(server):
    job_id = server.submit(steps=2)
    assert server.events(job_id)[-1]["event"] == "complete"
