"""Which jobs may share a batch."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def bucket(request: Mapping[str, Any]) -> str:
    """What jobs of one batch have in common: the size in pixels, whether they are guided, and their adapters.

    Args:
        request: as a `Job` has it.
    """
    guided = "guided" if request["guidance_scale"] > 1 else "unguided"
    name = f"{request['width']}x{request['height']}-{guided}"
    adapters = [[lora["path"], lora["strength"]] for lora in request.get("loras") or ()]
    if not adapters:
        return name
    # In their order: weights are summed in it, and the last bits of a sum depend on that.
    digest = hashlib.sha256(json.dumps(adapters).encode()).hexdigest()
    return f"{name}-{digest[:16]}"
