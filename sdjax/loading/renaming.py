"""From the module names of one layout to those of another, by whole parts of a path.

Replacing text inside names is how converters came to write `to_to_q`; a path's parts either match or are unknown.
"""

from collections.abc import Mapping

from sdjax.errors import CheckpointError
from sdjax.loading.weights import Tensor


def renamed(tensors: Mapping[str, Tensor], modules: Mapping[str, str], *, where: str) -> dict[str, Tensor]:
    """Give every tensor the name that it has in the other layout.

    Args:
        tensors: by name.
        modules: the new path of a module by its old one. The longest that a name begins with counts, and what follows
            it is kept.
        where: how errors begin.

    Raises:
        CheckpointError: a name begins with none of them, or two get one name; its name in the file is given.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        heads = (".".join(parts[:cut]) for cut in range(len(parts), 0, -1))
        old = next((head for head in heads if head in modules), None)
        if old is None:
            raise CheckpointError(f"{where} holds {tensor.name!r}, which no Stable Diffusion model has a place for")
        new = modules[old] + name[len(old) :]
        if new in found:
            raise CheckpointError(f"{where} holds {found[new].name!r} and {tensor.name!r}, two names for one tensor")
        found[new] = tensor
    return found


def shape_of(tensors: Mapping[str, Tensor], name: str, *, where: str) -> tuple[int, ...]:
    """The shape of a tensor that sizes are read from.

    Raises:
        CheckpointError: there is none of that name.
    """
    if name not in tensors:
        raise CheckpointError(f"{where} lacks {name!r}, from which the model's sizes are read")
    return tensors[name].shape


def counted(tensors: Mapping[str, Tensor], prefix: str) -> list[int]:
    """The numbers that follow a prefix in tensors' names, in order: `block.` counts the blocks."""
    numbers = {name[len(prefix) :].partition(".")[0] for name in tensors if name.startswith(prefix)}
    return sorted(int(number) for number in numbers if number.isdecimal())
