"""Draws on several simulated devices and writes down what came of it. Run by test_sharding.py, in a process of its own.

JAX has to be told of its devices before it starts: `XLA_FLAGS` names their number, and a folder for compiled programs.

    python many_devices.py FOLDER PROGRAMS    (FOLDER has model/, control/, lora.safetensors and noise.npy)
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding
from PIL import Image

import sdjax
from sdjax.devices.sharding import make_mesh, mesh_of, rows_spec
from sdjax.generation.batch import batch_axes

PROMPT, NEGATIVE = "the cat sat on the mat", "a"
MESHES = {
    "one": None,
    "data": {"data": 8},
    "model": {"data": 4, "model": 2},
    "guidance": {"data": 4, "guidance": 2},
    "all": {"data": 2, "guidance": 2, "model": 2},
}
# A sampler that draws noise at every step, and a rescaling that looks at both halves.
SETTINGS = {"steps": 3, "seed": 40, "sampler": "euler_a", "guidance_scale": 5.0, "guidance_rescale": 0.7}
SIZE = {"width": 64, "height": 64}


def main(folder: Path, programs: Path) -> None:
    pictures, facts = {}, {}
    lora = [(folder / "lora.safetensors", 1.0)]
    rng = np.random.default_rng(3)
    photo = Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8))
    mask = Image.fromarray(np.where(np.arange(64) < 24, 255, 0).astype(np.uint8)[None].repeat(64, 0))
    control = [(folder / "control", photo, 0.8)]
    pipes = {}
    for name, shape in MESHES.items():
        mesh = None if shape is None else make_mesh(**shape)
        pipes[name] = pipe = sdjax.Pipeline.from_pretrained(folder / "model", mesh=mesh)

        def draw(pipe=pipe, **changes):
            return np.stack(pipe(PROMPT, NEGATIVE, **{**SIZE, **SETTINGS, "num_images": 8, **changes}).images)

        pictures[f"{name} plain"] = draw()
        (program,) = programs.glob("*jit_denoise*after_optimizations.txt")
        program.rename(folder / f"{name}.hlo")
        if name in ("one", "data"):
            pictures[f"{name} repainted"] = draw(image=photo, mask=mask, strength=0.9)
        if name == "data":
            pictures["data three"] = draw(num_images=3)
            reported = []
            pictures["data told"] = draw(num_images=3, progress=lambda *told, reported=reported: reported.append(told))
            facts["reported"] = reported
            noise = np.load(folder / "noise.npy")
            pictures["data latents"] = draw(
                latents=noise, sampler="ddim", guidance_rescale=0.0, num_images=len(noise), output="latents"
            )
            pipe.save_pretrained(folder / "saved")
        if name in ("one", "guidance"):
            pictures[f"{name} unguided"] = draw(guidance_scale=1.0)
        if name in ("one", "model"):
            pictures[f"{name} adapted"] = draw(loras=lora)
        for program in programs.glob("*jit_denoise*.txt"):
            program.unlink()
        facts[name] = {
            ".".join(map(str, path)): [list(leaf.shape), list(leaf.addressable_shards[0].data.shape)]
            for path, leaf in flatten_dict(pipe.params).items()
        }

    model = pipes["model"]
    request = model.resolve(PROMPT, loras=lora, control=control, **SIZE, num_images=4, seed=0)
    with_lora = model.weights(request).params
    pairs = zip(flatten_dict(model.params).items(), flatten_dict(with_lora).items(), strict=False)
    facts["moved"] = [str(path) for (path, before), (_, after) in pairs if before.sharding != after.sharding]
    for part in ("unet", "controlnet_0"):
        facts[part] = sorted({str(leaf.sharding) for leaf in jax.tree.leaves(with_lora[part])})

    batch = pipes["guidance"].prepare(request).batch
    mesh = mesh_of(pipes["guidance"].params)
    places = jax.tree.map(lambda axis, x: NamedSharding(mesh, rows_spec(axis, x, mesh)), batch_axes(batch), batch)
    placed = jax.device_put(batch, places)
    facts["batch"] = {
        "context": list(placed.cond.context.addressable_shards[0].data.shape),
        "state": list(placed.state.addressable_shards[0].data.shape),
        "control": list(placed.cond.controls[0].scale.addressable_shards[0].data.shape),
    }
    for name in ("one", "guidance"):
        plain = pipes[name].resolve(PROMPT, **SIZE, num_images=4, seed=0)
        pictures[f"{name} noise"] = np.asarray(pipes[name].prepare(plain).batch.state[:, 0])
    np.savez(folder / "pictures.npz", **pictures)
    (folder / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
