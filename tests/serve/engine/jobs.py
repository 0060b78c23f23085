"""What these tests ask for, and what the library makes of it."""

import io

import numpy as np
from PIL import Image

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
