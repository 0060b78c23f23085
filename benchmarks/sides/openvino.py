"""OpenVINO on a CPU: diffusers' models, converted in memory; its own loop of diffusers' scheduler for a picture."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import openvino
import torch

from benchmarks import random_values
from benchmarks.cases import MATMUL_SIZE, Case, Prepared, Skipped
from benchmarks.sides import diffusers_eager as models

PRECISION = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


def prepare(case: Case) -> Prepared:
    """Make a case ready on the CPU."""
    if case.device != "cpu":
        raise Skipped(f"OpenVINO is timed on the CPU here, not on {case.device}")
    if case.what not in CASES:
        raise Skipped("OpenVINO has no such case here")
    with torch.inference_mode():
        run = CASES[case.what](case)
    left, right = (torch.from_numpy(random_values.normal((MATMUL_SIZE, MATMUL_SIZE), i)) for i in range(2))
    return Prepared(run, lambda: torch.mm(left, right))


class _Unet(torch.nn.Module):
    """The UNet as a function of tensors: what SDXL hears beside the prompt is a dictionary in diffusers."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, sample: Any, times: Any, context: Any, *added: Any) -> Any:
        extra = dict(zip(("text_embeds", "time_ids"), added, strict=True)) if added else None
        return self.model(sample, times, context, added_cond_kwargs=extra, return_dict=False)[0]


class _Decoder(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, latents: Any) -> Any:
        return self.model.decode(latents, return_dict=False)[0]


class _Text(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Any) -> Any:
        said = self.model(ids, output_hidden_states=True)
        return said.hidden_states[-2], said[0]


def _compiled(model: torch.nn.Module, inputs: tuple[Any, ...], case: Case) -> Callable[..., Any]:
    """Convert for the inputs' shapes and compile: a function of NumPy arrays, to the first output or all of them."""
    converted = openvino.convert_model(model, example_input=inputs, input=[list(x.shape) for x in inputs])
    # Unasked, OpenVINO computes in bfloat16 where the processor can.
    ready = openvino.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": PRECISION[case.arithmetic]})
    request = ready.create_infer_request()

    def call(*arrays: Any) -> Any:
        said = request.infer(list(arrays), share_inputs=True, share_outputs=True)
        outputs = [said[i] for i in range(len(ready.outputs))]
        return outputs[0] if len(outputs) == 1 else outputs

    return call


def _of(inputs: tuple[Any, ...]) -> list[Any]:
    return [x.float().numpy() if x.is_floating_point() else x.numpy() for x in inputs]


def _inputs(case: Case) -> tuple[Any, ...]:
    rows, side, unet = case.sizes.rows * case.batch, case.sizes.latent_size, case.sizes.unet
    sample = models.tensor(random_values.normal((rows, unet["in_channels"], side, side), 2), case)
    context = models.tensor(random_values.normal((rows, case.sizes.tokens, unet["cross_attention_dim"]), 1), case)
    added = models.extra_conditioning(case)
    return sample, torch.full((rows,), 801), context, *(() if added is None else added.values())


def _unet(case: Case) -> Callable[[], object]:
    inputs = _inputs(case)
    step = _compiled(_Unet(models.unet(case)), inputs, case)
    arrays = _of(inputs)
    return lambda: step(*arrays)


def _decoder(case: Case) -> tuple[Callable[..., Any], list[Any]]:
    channels, side = case.sizes.vae["latent_channels"], case.sizes.latent_size
    inputs = (models.tensor(random_values.normal((case.batch, channels, side, side), 2), case),)
    return _compiled(_Decoder(models.vae(case)), inputs, case), _of(inputs)


def _vae_decode(case: Case) -> Callable[[], object]:
    decode, arrays = _decoder(case)
    return lambda: decode(*arrays)


def _encoders(case: Case) -> list[tuple[Callable[..., Any], list[Any]]]:
    made = []
    for model, ids in zip(models.text_encoders(case), models.prompt_ids(case), strict=True):
        made.append((_compiled(_Text(model), (ids,), case), _of((ids,))))
    return made


def _text_encoder(case: Case) -> Callable[[], object]:
    encoders = _encoders(case)
    return lambda: [encode(*arrays) for encode, arrays in encoders]


def _picture(case: Case) -> Callable[[], object]:
    import diffusers

    encoders = _encoders(case)
    _, times, _, *added = inputs = _inputs(case)
    step = _compiled(_Unet(models.unet(case)), inputs, case)
    decode, (noise,) = _decoder(case)
    rest = _of(tuple(added))
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
    )

    def run() -> object:
        said = [encode(*arrays) for encode, arrays in encoders]
        context = np.concatenate([hidden for hidden, _ in said], -1) if len(said) > 1 else said[0][1]
        scheduler.set_timesteps(case.step_count)
        latents = torch.from_numpy(noise)
        for time in scheduler.timesteps:
            sample = latents.repeat(case.sizes.rows, 1, 1, 1).numpy()
            output = torch.from_numpy(step(sample, np.full(times.shape, int(time)), context, *rest))
            if case.sizes.guided:
                without, with_prompt = output.chunk(2)
                output = without + case.guidance_scale * (with_prompt - without)
            latents = scheduler.step(output, int(time), latents).prev_sample
        return decode((latents / case.sizes.vae["scaling_factor"]).numpy())

    return run


CASES: Mapping[str, Callable[[Case], Callable[[], object]]] = {
    "text-encoder": _text_encoder,
    "unet": _unet,
    "vae-decode": _vae_decode,
    "picture": _picture,
}
