"""ComfyUI's graph of nodes, from which the settings of the first sampler are read.

A graph is `{id: {"class_type": name, "inputs": {name: value or [id of another node, number of its output]}}}`. Later
samplers, which enlarge or refine, are left out: prompt, seed and size belong to the first one.
"""

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from sdjax.metadata.fields import fields, layers_left_out, size

Node: TypeAlias = Mapping[str, Any]
Graph: TypeAlias = Mapping[str, Any]
MANY = 64
"""Samplers that are looked at: each means a walk through the graph, and a file may hold anything."""
_SEEDS = ("seed", "noise_seed")
_LATENTS = ("latent_image", "latent", "samples")
_SCALARS = ("value", "seed", "noise_seed", "int", "float", "number", "string", "text")
"""Inputs that hold what a node of a single value gives."""
_WORDS = ("text", "text_g", "text_l", "clip_l", "t5xxl", "prompt", "string", "value", "text_positive")


def from_graph(graph: Graph) -> dict[str, Any] | None:
    """Read the first sampler of a graph; None where there is none."""
    sampler = _first_sampler(graph)
    if sampler is None:
        return None
    # A custom sampler has its parts in nodes of their own: noise, guider, sampler and sigmas.
    parts = [
        sampler,
        *(node for name in ("noise", "guider", "sampler", "sigmas") if (node := _at(graph, sampler, name))),
    ]
    seed = _first(graph, parts, _SEEDS)
    guided = next((part for part in parts if "positive" in _inputs(part) or "conditioning" in _inputs(part)), sampler)
    latent = next((node for name in _LATENTS if (node := _at(graph, sampler, name))), None)
    blank = None if latent is None else _upstream(graph, latent, "width")
    model_from = next((part for part in parts if "model" in _inputs(part)), sampler)
    models = [] if (model := _at(graph, model_from, "model")) is None else list(_walk(graph, model, prefer="model"))
    # Adapters are met from the last one to the first.
    loras = [
        f"{name}:{_scalar(graph, node, 'strength_model')}"
        for node in reversed(models)
        if isinstance(name := _inputs(node).get("lora_name"), str)
    ]
    strength = _first(graph, parts, ("denoise",))
    positive = "positive" if "positive" in _inputs(guided) else "conditioning"
    known = {
        "steps": _first(graph, parts, ("steps",)),
        "sampler": _first(graph, parts, ("sampler_name",)),
        "schedule": _first(graph, parts, ("scheduler",)),
        "guidance_scale": _first(graph, parts, ("cfg", "cfg_scale")),
        "seed": seed,
        "size": None if blank is None else size(_scalar(graph, blank, "width"), _scalar(graph, blank, "height")),
        "strength": None if strength == 1 else strength,
        "clip_skip": layers_left_out(_clip_skip(graph, guided, positive)),
        "loras": ", ".join(loras) or None,
        "model": next((name for node in models if (name := _model_name(node))), None),
    }
    return fields(_words(graph, guided, positive), _words(graph, guided, "negative"), known, {})


def _first_sampler(graph: Graph) -> Node | None:
    """The sampler whose latents come from no other one; the first in the file where there are several."""
    samplers: list[Node] = [node for node in graph.values() if _is_sampler(node)][:MANY]
    for node in samplers:
        before = (latent for name in _LATENTS if (latent := _at(graph, node, name)))
        if not any(_is_sampler(other) and other is not node for latent in before for other in _walk(graph, latent)):
            return node
    return samplers[0] if samplers else None


def _is_sampler(node: object) -> bool:
    inputs = _inputs(node)
    return "latent_image" in inputs and any(name in inputs for name in (*_SEEDS, "noise"))


def _inputs(node: object) -> Mapping[str, Any]:
    inputs: object = node.get("inputs") if isinstance(node, Mapping) else None
    return inputs if isinstance(inputs, Mapping) else {}


def _at(graph: Graph, node: Node, name: str) -> Node | None:
    """The node that an input is linked to."""
    link = _inputs(node).get(name)
    if not isinstance(link, list) or not link or not isinstance(link[0], str | int):
        return None
    found: Node | None = graph.get(str(link[0]))
    return found if _inputs(found) else None


def _walk(graph: Graph, start: Node, prefer: str | None = None) -> Iterator[Node]:
    """A node and all before it, each once; along one input where a node has it, else along all."""
    waiting, seen = [start], set()
    while waiting:
        node = waiting.pop(0)
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        names = [prefer] if prefer is not None and _at(graph, node, prefer) else list(_inputs(node))
        waiting += [before for name in names if (before := _at(graph, node, name))]


def _upstream(graph: Graph, start: Node, name: str) -> Node | None:
    """The nearest node, from a start backwards, that has an input of this name."""
    return next((node for node in _walk(graph, start) if name in _inputs(node)), None)


def _scalar(graph: Graph, node: Node, name: str) -> object:
    """An input's value, or that of the node of a single value that it is linked to."""
    value = _inputs(node).get(name)
    for _ in range(len(graph)):
        if not isinstance(value, list):
            return value
        linked = _at(graph, {"inputs": {"it": value}}, "it")
        value = (
            None if linked is None else next((_inputs(linked)[key] for key in _SCALARS if key in _inputs(linked)), None)
        )
    return None


def _first(graph: Graph, nodes: list[Node], names: tuple[str, ...]) -> object:
    return next((value for node in nodes for name in names if (value := _scalar(graph, node, name)) is not None), None)


def _words(graph: Graph, sampler: Node, name: str) -> str | None:
    """The texts that a sampler's `positive` or `negative` comes from, each once."""
    start, found = _at(graph, sampler, name), []
    waiting, seen = [] if start is None else [start], set()
    while waiting:
        node = waiting.pop(0)
        if id(node) in seen or node.get("class_type") == "ConditioningZeroOut":
            continue
        seen.add(id(node))
        texts = [text for key in _WORDS if isinstance(text := _scalar(graph, node, key), str) and text.strip()]
        found += [text for text in dict.fromkeys(texts) if text not in found]
        if not texts:
            inputs = list(_inputs(node))
            # A ControlNet's picture may come from a prompt of its own.
            along = [key for key in inputs if key == name] or [key for key in inputs if key.startswith("conditioning")]
            waiting += [before for key in along or inputs if (before := _at(graph, node, key))]
    return "\n".join(found) or None


def _clip_skip(graph: Graph, sampler: Node, name: str) -> object:
    start = _at(graph, sampler, name)
    node = None if start is None else _upstream(graph, start, "stop_at_clip_layer")
    return None if node is None else _scalar(graph, node, "stop_at_clip_layer")


def _model_name(node: Node) -> str | None:
    inputs = _inputs(node)
    return next(
        (inputs[key] for key in ("ckpt_name", "unet_name", "model_name") if isinstance(inputs.get(key), str)), None
    )
