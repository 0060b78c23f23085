"""diffusers with PyTorch as it comes: eager, channels-last convolutions (its own advice for speed).

What begins with files (load, first picture, throughput) is what its documentation shows: `from_pretrained`, a call.
"""

import gc
import inspect
import mmap
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from benchmarks import peer_process, random_values
from benchmarks.cases import FROM_FOLDER, MATMUL_SIZE, PROMPT, Case, Prepared, Skipped


def prepare(case: Case) -> Prepared:
    """Make a case ready on the CPU or a CUDA device."""
    if case.what.startswith("first-"):
        check_device(case)
        return peer_process.prepare(case)
    return prepare_with(case, lambda model: model)


def prepare_with(case: Case, finish: Callable[[Any], Any]) -> Prepared:
    """The same, with something done to every model (such as compiling it)."""
    check_device(case)
    if case.what in FROM_FOLDER and case.folder is None:
        raise Skipped("there is no folder to read")
    if case.what not in CASES:
        raise Skipped("diffusers has no such case here")
    run = CASES[case.what](case, finish)
    left, right = (tensor(random_values.normal((MATMUL_SIZE, MATMUL_SIZE), i), case) for i in range(2))

    def timed() -> None:
        with torch.inference_mode():
            run()
        _wait(case)

    def matmul() -> None:
        torch.mm(left, right)
        _wait(case)

    return Prepared(timed, matmul)


def check_device(case: Case) -> None:
    """Skip what PyTorch can't run on."""
    if case.device == "gpu" and not torch.cuda.is_available():
        raise Skipped("PyTorch sees no GPU")
    if case.device not in ("cpu", "gpu"):
        raise Skipped(f"PyTorch does not run on {case.device} here")


def _wait(case: Case) -> None:
    if case.device == "gpu":
        torch.cuda.synchronize()


def tensor(values: Any, case: Case) -> torch.Tensor:
    """A tensor on the case's device, of its dtype."""
    return torch.from_numpy(values).to("cuda" if case.device == "gpu" else "cpu", getattr(torch, case.arithmetic))


def filled(make: Callable[[], torch.nn.Module], case: Case) -> Any:
    """A model with random weights, made in place: nothing is initialised and thrown away."""
    with torch.device("meta"):
        model = make().eval()
    model = model.to(getattr(torch, case.arithmetic)).to_empty(device="cuda" if case.device == "gpu" else "cpu")
    for offset, (name, parameter) in enumerate(model.named_parameters()):
        fan_in = parameter[0].numel() if parameter.ndim > 1 else parameter.numel()
        is_scale = "norm" in name and name.endswith("weight")
        value = random_values.weight(parameter.shape, fan_in, offset, is_scale=is_scale)
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(value))
    for name, buffer in model.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[-1]).expand(buffer.shape))
    return model.to(memory_format=torch.channels_last)


def unet(case: Case) -> Any:
    """The UNet, with random weights."""
    return filled(
        lambda: diffusers.UNet2DConditionModel(**_accepted(diffusers.UNet2DConditionModel, case.sizes.unet)), case
    )


def vae(case: Case) -> Any:
    """The autoencoder, with random weights."""
    return filled(lambda: diffusers.AutoencoderKL(**_accepted(diffusers.AutoencoderKL, case.sizes.vae)), case)


def _accepted(kind: type, config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without the notes that diffusers adds when it saves."""
    known = inspect.signature(kind.__init__).parameters
    return {key: value for key, value in config.items() if key in known}


def text_encoders(case: Case) -> list[Any]:
    """The text encoders, with random weights."""
    made = []
    for name, config in case.sizes.text_encoders.items():
        last_of_two = name == "text_encoder_2"
        kind = transformers.CLIPTextModelWithProjection if last_of_two else transformers.CLIPTextModel
        settings = transformers.CLIPTextConfig(
            **{k: v for k, v in config.items() if k not in ("architectures", "dtype")}
        )
        made.append(filled(lambda kind=kind, settings=settings: kind(settings), case))  # type: ignore[misc]
    return made


def _text_encoder(case: Case, finish: Callable[[Any], Any]) -> Callable[[], object]:
    encoders = [finish(model) for model in text_encoders(case)]
    ids = prompt_ids(case)
    return lambda: [encoder(x, output_hidden_states=True) for encoder, x in zip(encoders, ids, strict=True)]


def prompt_ids(case: Case) -> list[torch.Tensor]:
    """Random words for each text encoder."""
    rows = case.sizes.rows * case.batch
    device = "cuda" if case.device == "gpu" else "cpu"
    return [
        torch.from_numpy(random_values.token_ids(rows, config["max_position_embeddings"], config["eos_token_id"]))
        .long()
        .to(device)
        for config in case.sizes.text_encoders.values()
    ]


def extra_conditioning(case: Case) -> dict[str, torch.Tensor] | None:
    """What SDXL hears beside the prompt, None for the others."""
    if "addition_embed_type" not in case.sizes.unet or case.sizes.unet["addition_embed_type"] is None:
        return None
    rows = case.sizes.rows * case.batch
    width = list(case.sizes.text_encoders.values())[-1]["projection_dim"]
    size = float(case.sizes.size)
    ids = torch.tensor([[size, size, 0, 0, size, size]] * rows)
    return {"text_embeds": tensor(random_values.normal((rows, width), 3), case), "time_ids": tensor(ids.numpy(), case)}


def _unet(case: Case, finish: Callable[[Any], Any]) -> Callable[[], object]:
    model = finish(unet(case))
    rows, side = case.sizes.rows * case.batch, case.sizes.latent_size
    sample = tensor(random_values.normal((rows, model.config.in_channels, side, side), 2), case)
    sample = sample.contiguous(memory_format=torch.channels_last)
    context = tensor(random_values.normal((rows, case.sizes.tokens, model.config.cross_attention_dim), 1), case)
    timesteps = torch.full((rows,), 801, device=sample.device)
    added = extra_conditioning(case)
    return lambda: model(sample, timesteps, context, added_cond_kwargs=added, return_dict=False)


def _vae_decode(case: Case, finish: Callable[[Any], Any]) -> Callable[[], object]:
    model = vae(case)
    decode = finish(model.decode)
    side = case.sizes.latent_size
    latents = tensor(random_values.normal((case.batch, model.config.latent_channels, side, side), 2), case)
    latents = latents.contiguous(memory_format=torch.channels_last)
    return lambda: decode(latents, return_dict=False)


def pipeline(case: Case, *, with_tokenizers: bool = False) -> Any:
    """A pipeline of random weights."""
    encoders = dict(zip(case.sizes.text_encoders, text_encoders(case), strict=True))
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
    )
    parts = {"unet": unet(case), "vae": vae(case), "scheduler": scheduler, **encoders}
    for name in encoders:
        parts[name.replace("text_encoder", "tokenizer")] = _tokenizer() if with_tokenizers else None
    if len(encoders) > 1:
        return diffusers.StableDiffusionXLPipeline(**parts)
    parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return diffusers.StableDiffusionPipeline(**parts)


def _tokenizer() -> Any:
    """CLIP's tokenizer, from the tables that sdjax holds."""
    from sdjax.loading.saving import save_tokenizer
    from sdjax.loading.tokenizer import END, published_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(published_tokenizer(END), Path(folder))
        return transformers.CLIPTokenizer.from_pretrained(folder)


def loaded(case: Case) -> Any:
    """The pipeline from the case's folder, on its device."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(case.folder, torch_dtype=getattr(torch, case.arithmetic))
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda" if case.device == "gpu" else "cpu")


def draw(pipe: Any, case: Case) -> Any:
    """Pictures of one prompt, as many as the case's batch."""
    drawn = pipe(
        [PROMPT] * case.batch,
        num_inference_steps=case.step_count,
        guidance_scale=case.guidance_scale,
        height=case.sizes.size,
        width=case.sizes.size,
    )
    return drawn.images


def _load(case: Case, finish: Callable[[Any], Any]) -> Callable[[], object]:
    """Until every weight is in memory, in the layout that is computed with: `from_pretrained` only maps the files."""
    held: list[Any] = []

    def run() -> None:
        held.clear()
        gc.collect()  # a pipeline is part of a cycle
        pipe = loaded(case)
        held.append(pipe)
        for name in ("unet", "vae", *case.sizes.text_encoders):
            for parameter in getattr(pipe, name).to(memory_format=torch.channels_last).parameters():
                if parameter.is_contiguous():  # the others were copied
                    parameter.detach().view(-1)[:: mmap.PAGESIZE // parameter.element_size()].sum()

    return run


def _throughput(case: Case, finish: Callable[[Any], Any]) -> Callable[[], object]:
    pipe = loaded(case)
    pipe.unet = finish(pipe.unet)
    return lambda: draw(pipe, case)


def _picture(case: Case, finish: Callable[[Any], Any]) -> Callable[[], object]:
    pipe = pipeline(case)
    encoders = [getattr(pipe, name) for name in case.sizes.text_encoders]
    pipe.unet = finish(pipe.unet)
    pipe.set_progress_bar_config(disable=True)
    ids = prompt_ids(case)
    side = case.sizes.latent_size
    noise = tensor(random_values.normal((case.batch, pipe.unet.config.in_channels, side, side), 2), case)

    def run() -> object:
        states = [encoder(x, output_hidden_states=True) for encoder, x in zip(encoders, ids, strict=True)]
        arguments: dict[str, Any] = {}
        if len(states) > 1:
            hidden = torch.cat([state.hidden_states[-2] for state in states], dim=-1)
            pooled = states[-1].text_embeds
            arguments["pooled_prompt_embeds"] = pooled[-case.batch :]
            if case.sizes.guided:
                arguments["negative_pooled_prompt_embeds"] = pooled[: case.batch]
        else:
            hidden = states[0].last_hidden_state
        if case.sizes.guided:
            arguments["negative_prompt_embeds"] = hidden[: case.batch]
        return pipe(
            prompt_embeds=hidden[-case.batch :],
            num_inference_steps=case.step_count,
            guidance_scale=case.guidance_scale,
            latents=noise,
            height=case.sizes.size,
            width=case.sizes.size,
            output_type="np",
            **arguments,
        )

    return run


CASES: Mapping[str, Callable[[Case, Callable[[Any], Any]], Callable[[], object]]] = {
    "text-encoder": _text_encoder,
    "unet": _unet,
    "vae-decode": _vae_decode,
    "picture": _picture,
    "load": _load,
    "throughput": _throughput,
}
