"""Arguments that do not exist, and the ones that were probably meant: diffusers' spellings among them."""

import difflib
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType

OF_A_CALL: Mapping[str, str] = MappingProxyType(
    {
        "num_inference_steps": "steps",
        "num_steps": "steps",
        "num_images_per_prompt": "num_images",
        "n": "num_images",
        "batch_size": "num_images",
        "generator": "seed",
        "manual_seed": "seed",
        "mask_image": "mask",
        "init_image": "image",
        "input_image": "image",
        "ip_adapter_image": "image",
        "control_image": "control",
        "controlnet": "control",
        "controlnet_conditioning_scale": "control",
        "control_guidance_start": "control",
        "control_guidance_end": "control",
        "guess_mode": "control",
        "output_type": "output",
        "return_dict": "output",
        "callback": "progress",
        "callback_on_step_end": "progress",
        "scheduler": "sampler",
        "sampler_name": "sampler",
        "sigmas": "schedule",
        "timesteps": "schedule",
        "cfg": "guidance_scale",
        "cfg_scale": "guidance_scale",
        "denoising_strength": "strength",
        "cross_attention_kwargs": "loras",
        "lora_scale": "loras",
        "textual_inversion": "embeddings",
        "crops_coords_top_left": "crop",
        "size": "width and height",
        "resolution": "width and height",
        "vae_tiling": "tiling",
    }
)
OF_LOADING: Mapping[str, str] = MappingProxyType(
    {
        "torch_dtype": "dtype",
        "pretrained_model_name_or_path": "model",
        "pretrained_model_link_or_path": "model",
        "device": "mesh",
        "device_map": "mesh",
        "quantization_config": "weights",
        "load_in_8bit": "weights",
        "scheduler_type": "prediction_type",
    }
)


def refuse(unknown: Iterable[str], known: Collection[str], elsewhere: Mapping[str, str], what: str) -> None:
    """Refuse arguments by name, with the one that was probably meant.

    Args:
        unknown: their names; none is fine.
        known: the names that there are.
        elsewhere: what other libraries call some of them.
        what: takes them, for the message.

    Raises:
        TypeError: there is one.
    """
    for name in unknown:
        near = difflib.get_close_matches(name, known, n=1)
        meant = elsewhere.get(name) or (near[0] if near else None)
        hint = f"did you mean {meant}?" if meant else f"there are {', '.join(known)}"
        raise TypeError(f"{what} takes no argument {name!r}: {hint}")
