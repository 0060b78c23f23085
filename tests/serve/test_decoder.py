"""Pictures as weapons: files that take a decoder minutes hold up nobody but their sender."""

import asyncio
import io
import os
import signal
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import numpy as np
import pytest
from PIL import Image

from sdjax.serve import decoder, decoder_process
from sdjax.serve.decoder import Decoder
from sdjax.serve.pictures import MOST_SCANS, PictureError, count_scans, read_picture
from tests.serve.conftest import as_base64, picture, wait_for
from tests.serve.test_process import Process

TEXT = {"operation": "image_generation", "prompt": "a red circle", "steps": 4}


def transform(data):
    return {**TEXT, "operation": "image_transform", "input_image": as_base64(data)}


def progressive(scans, side=2048):
    """A JPEG file whose last scan is there again and again: each takes a decoder through the whole picture."""
    whole = picture(side, side, "JPEG", progressive=True, quality=50)
    last = whole.rfind(b"\xff\xda")
    return whole[:last] + whole[last:-2] * scans + whole[-2:]


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of_many_chunks(kind, data=b"", count=1_000_000):
    whole = picture(64, 64)
    return whole[:33] + chunk(kind, data) * count + whole[33:]


WEAPONS = {
    "unknown chunks": png_of_many_chunks(b"abCd"),
    "text chunks": png_of_many_chunks(b"tEXt", b"a\0b"),
    "empty data": png_of_many_chunks(b"IDAT", count=2_000_000),
    "comments of a jpeg": picture(64, 64, "JPEG")[:2] + b"\xff\xfe\x00\x02" * 4_000_000 + picture(64, 64, "JPEG")[2:],
}


def read(data, times=1):
    async def decode():
        reader = Decoder()
        try:
            return [await reader.read(data) for _ in range(times)]
        finally:
            await reader.close()

    return asyncio.run(decode())


def files_of_many_modes():
    colors = np.arange(64 * 64 * 4, dtype=np.uint32).astype(np.uint8).reshape(64, 64, 4)
    rgba = Image.fromarray(colors, "RGBA")
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        yield f"png {mode}", "PNG", rgba.convert(mode), {}
    yield "png I;16", "PNG", Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16), {}
    yield "png transparent color", "PNG", rgba.convert("RGB"), {"transparency": (0, 1, 2)}
    yield "png transparent palette", "PNG", rgba.convert("P"), {"transparency": bytes(range(200))}
    yield "png transparent gray", "PNG", rgba.convert("L"), {"transparency": 7}
    exif = Image.Exif()
    exif[0x0112] = 6
    yield "jpeg turned", "JPEG", rgba.convert("RGB"), {"exif": exif}
    yield "jpeg CMYK", "JPEG", rgba.convert("CMYK"), {}
    yield "webp", "WEBP", rgba, {"lossless": True}


FILES = {name: rest for name, *rest in files_of_many_modes()}


@pytest.mark.parametrize("name", FILES)
def test_a_picture_comes_out_of_its_process_as_it_is(name):
    kind, image, options = FILES[name]
    file = io.BytesIO()
    image.save(file, kind, **options)
    (found,), expected = read(file.getvalue()), read_picture(file.getvalue())
    assert (found.mode, found.size, found.format) == (expected.mode, expected.size, expected.format)
    assert found.getexif().get(0x0112) == expected.getexif().get(0x0112)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
    np.testing.assert_array_equal(np.asarray(found.convert("RGBA")), np.asarray(expected.convert("RGBA")))


def test_scans_are_counted_and_nothing_that_only_looks_like_one():
    assert count_scans(picture(64, 64, "JPEG")) == 1
    ordinary = picture(64, 64, "JPEG", progressive=True)
    assert 1 < count_scans(ordinary) < 20
    assert count_scans(progressive(500, 64)) == 500 + count_scans(ordinary) - 1
    hidden = b"\xff\xe1" + struct.pack(">H", 2 + 4 * 1000) + b"\xff\xda\x00\x00" * 1000  # as a thumbnail has them
    behind = ordinary + b"\xff\xda\x00\x02" * 1000  # as a phone's moving picture has them
    assert count_scans(ordinary[:2] + hidden + behind[2:]) == count_scans(ordinary)


def test_a_jpeg_of_many_scans_is_refused_before_it_is_decoded():
    with pytest.raises(PictureError, match=f"more than {MOST_SCANS} scans"):
        read_picture(progressive(40_000))


def test_a_picture_that_takes_too_long_is_refused(monkeypatch):
    monkeypatch.setattr(decoder, "QUICK", 0.05)
    monkeypatch.setattr(decoder, "SLOW", 0.1)
    with pytest.raises(PictureError, match="too long"):
        read(WEAPONS["unknown chunks"])


def test_a_process_ends_by_itself_when_its_processor_time_is_spent():
    async def decode():
        reader = Decoder()
        await reader.start()
        (child,) = reader._idle
        child.process.kill()  # as the system does then
        await child.process.wait()
        found = await reader.read(picture(64, 64))
        await reader.close()
        return found

    assert asyncio.run(decode()).size == (64, 64)
    assert decoder_process.CPU_SECONDS < decoder.SLOW


def test_one_process_serves_honest_pictures_after_each_other():
    async def decode():
        reader = Decoder()
        for _ in range(3):
            await reader.read(picture(64, 64))
            with pytest.raises(PictureError):
                await reader.read(b"nonsense")
        (child,) = reader._idle
        await reader.close()
        return child.process

    process = asyncio.run(decode())
    assert process.returncode == -signal.SIGKILL
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)


@pytest.mark.parametrize("name", WEAPONS)
def test_honest_submissions_pass_slow_pictures_by(serve, monkeypatch, name):
    monkeypatch.setattr(decoder, "QUICK", 0.1)
    server = serve()
    weapon = transform(WEAPONS[name])
    with ThreadPoolExecutor(8) as pool:
        attack = [pool.submit(server.client.post, "/v1/jobs", json=weapon, timeout=120) for _ in range(4)]
        wait_for(lambda: server.app.state.front.decoder._slow == 4)
        assert server.client.post("/v1/jobs", json=TEXT).status_code == 200
        assert server.client.post("/v1/jobs", json=transform(picture(512, 512))).status_code == 200
        edit = server.client.post("/v1/images/edits", files={"image": picture(64, 64)}, data={"prompt": "a circle"})
        assert edit.status_code == 200
        for child in server.app.state.front.decoder._all:
            if child.is_slow:
                child.process.send_signal(signal.SIGSTOP)  # however fast this machine is, they are at it still
        assert not any(answer.done() for answer in attack)
        fifth = server.client.post("/v1/jobs", json=weapon)
        assert (fifth.status_code, fifth.json()["error"]["code"]) == (503, "busy")
        for child in list(server.app.state.front.decoder._all):
            child.process.kill()
        for answer in attack:
            assert answer.result().status_code == 422
            assert answer.result().json()["error"]["field"] == "input_image"


def test_a_server_under_attack_ends_well_when_it_is_told_to(tmp_path):
    process = Process("--data-dir", str(tmp_path))
    wait_for(lambda: process.client.get("/ready").status_code == 200, 300)
    weapons = [transform(progressive(40_000)), *map(transform, WEAPONS.values())]

    def attack(weapon):
        with suppress(httpx.HTTPError):  # it may come too late
            process.client.post("/v1/jobs", json=weapon, timeout=120)

    threads = [threading.Thread(target=attack, args=(weapon,)) for weapon in weapons * 2]
    for thread in threads:
        thread.start()
    assert process.client.post("/v1/jobs", json=TEXT).status_code == 200
    assert process.stop() == 0
    for thread in threads:
        thread.join(60)
