"""What other tools write into picture files is read, or given raw."""

import contextlib
import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from sdjax import metadata
from tests.metadata.tool_texts import COMFYUI, FROM_COMFYUI, TOOLS, WEB_UI, png, read, with_exif

Image.init()
KINDS = [kind for kind in ("JPEG", "WEBP", "AVIF", "PNG") if kind in Image.SAVE]  # AVIF since Pillow 11.3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "comment",
    [
        b"UNICODE\0" + WEB_UI.encode("utf-16-be"),
        b"UNICODE\0" + WEB_UI.encode("utf-16-le"),
        b"UNICODE\0" + WEB_UI.encode("utf-16"),
        b"UNICODE\0" + WEB_UI.encode(),
        b"ASCII\0\0\0" + WEB_UI.encode(),
        bytes(8) + WEB_UI.encode(),
        WEB_UI.encode(),
    ],
    ids=["big-endian", "little-endian", "byte order mark", "utf-8", "ascii", "undefined", "no code"],
)
def test_the_web_uis_text_is_read_from_a_user_comment(tmp_path, kind, comment):
    assert read(tmp_path, with_exif(kind, comment=comment)) == metadata.from_text(WEB_UI)


@pytest.mark.parametrize("tool", TOOLS)
def test_what_other_tools_write_is_brought_to_the_shared_fields(tmp_path, tool):
    texts, wanted = TOOLS[tool]
    found = read(tmp_path, png(texts))
    assert found == wanted
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
@pytest.mark.parametrize("tool", ["swarmui", "fooocus"])
def test_json_in_a_user_comment_is_read_too(tmp_path, tool, kind):
    texts, wanted = TOOLS[tool]
    comment = b"UNICODE\0" + texts["parameters"].encode("utf-16-be")
    assert read(tmp_path, with_exif(kind, comment=comment)) == wanted


def test_comfyuis_graph_is_read_from_the_exif_fields_of_a_webp_file(tmp_path):
    data = with_exif("WEBP", model="prompt:" + json.dumps(COMFYUI), make='workflow:{"nodes": []}')
    assert read(tmp_path, data) == FROM_COMFYUI


def test_novelais_texts_are_read_from_the_comment_of_a_webp_file(tmp_path):
    texts, wanted = TOOLS["novelai"]
    assert read(tmp_path, with_exif("WEBP", comment=b"ASCII\0\0\0" + json.dumps(texts).encode())) == wanted


@pytest.mark.parametrize(
    "texts",
    [
        {"Author": "somebody", "Comment": "drawn by hand"},
        {"prompt": "{}", "workflow": '{"nodes": [{"id": 1}]}'},
        {"prompt": '{"1": {"class_type": "SaveImage", "inputs": {"images": ["1", 0]}}}'},
        {"parameters": '{"unknown": "tool"}'},
        {"invokeai_metadata": "[]"},
        {"invokeai_metadata": '{"core": {}}'},
        {"sd-metadata": '{"image": 3}'},
        {"Comment": '{"Comment": "{}"}'},
    ],
    ids=lambda texts: "+".join(texts),
)
def test_texts_of_no_known_tool_are_given_raw(tmp_path, texts):
    assert read(tmp_path, png(texts)) == {"texts": texts}


KEYS = ("3", "inputs", "seed", "steps", "model", "positive", "prompt", "loras", "text", "latent_image", "noise", "uc")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(["3", 0]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(KEYS),
            inner,
            max_size=4,
        )
    ),
    max_leaves=25,
)
NAMES = ("prompt", "invokeai_metadata", "sd-metadata", "Comment", "parameters", "Software", "UserComment")


@settings(deadline=None, max_examples=300)
@given(st.dictionaries(st.sampled_from(NAMES), JSON.map(json.dumps) | st.text(max_size=20), max_size=3), st.booleans())
def test_any_json_is_read_or_given_raw(tmp_path_factory, texts, nested):
    if nested:
        texts = {
            name: f'{{"sui_image_params": {text}, "base_model": {text}, "image": {text}}}'
            for name, text in texts.items()
        }
    if not any(text.strip() for text in texts.values()):
        return
    texts = {name: text.replace("\0", "") or "x" for name, text in texts.items()}
    found = read(tmp_path_factory.getbasetemp(), png(texts))
    json.dumps(found, allow_nan=False)
    str(found).encode()


FILES = [
    png({"parameters": WEB_UI}),
    png(TOOLS["comfyui"][0]),
    with_exif("JPEG", comment=b"ASCII\0\0\0" + WEB_UI.encode()),
]
FILES += [with_exif("WEBP", comment=b"ASCII\0\0\0" + WEB_UI.encode(), model="prompt:{}")]


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(FILES), st.data())
def test_a_damaged_file_is_read_or_refused(tmp_path_factory, file, data):
    damaged = bytearray(file)
    for _ in range(data.draw(st.integers(0, 8))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    damaged = damaged[: data.draw(st.integers(0, len(damaged)))]
    with contextlib.suppress(metadata.MetadataError):
        read(tmp_path_factory.getbasetemp(), bytes(damaged))


def test_a_file_that_ends_too_soon_still_gives_its_parameters(tmp_path):
    file = io.BytesIO()
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", WEB_UI)
    Image.linear_gradient("L").save(file, "PNG", pnginfo=info)
    assert read(tmp_path, file.getvalue()[:-40]) == metadata.from_text(WEB_UI)
