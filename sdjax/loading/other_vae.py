"""Another autoencoder in the place of a checkpoint's own."""

from sdjax.errors import CheckpointError
from sdjax.loading.checkpoint import Parts
from sdjax.loading.folder import read_json, today_s_vae_names
from sdjax.loading.original_vae import vae_config, vae_tensors
from sdjax.loading.part import Part, read_part
from sdjax.loading.passengers import without_passengers

PREFIX = "first_stage_model."


def with_vae(parts: Parts, part: Part) -> Parts:
    """The same checkpoint with another autoencoder.

    Of a single file without a config, such as an autoencoder or a whole checkpoint in the original layout, what the
    tensors do not show (the scale of latents) is the checkpoint's own.

    Args:
        parts: of the checkpoint.
        part: where the autoencoder lies.

    Raises:
        CheckpointError: it can't be found or read, or is of another kind.
    """
    where, tensors, config_file = read_part(part, "vae")
    if any(name.startswith(PREFIX) for name in tensors):
        tensors = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
    tensors = without_passengers(tensors, "vae")
    own = parts.configs["vae"]
    if any(name.startswith("encoder.down.") for name in tensors):
        scale, size = own.get("scaling_factor", 0.18215), own.get("sample_size", 512)
        config = vae_config(tensors, scaling_factor=scale, sample_size=size, where=where)
        tensors = vae_tensors(tensors, where=where)
    else:
        config = read_json(config_file) if config_file else dict(own)
        kind = config.get("_class_name", "AutoencoderKL")
        if kind != "AutoencoderKL":
            raise CheckpointError(f"{where} is an {kind}, and only AutoencoderKL is supported")
        tensors = today_s_vae_names(tensors)
    return parts._replace(configs={**parts.configs, "vae": config}, tensors={**parts.tensors, "vae": tensors})
