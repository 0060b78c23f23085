"""From words to pictures in three pure functions: `encode_prompt`, `denoise` and `decode`.

Each is a function of (definition, params, arrays): it can be jitted (the definition is static), vmapped, sharded and
differentiated. Batch rows are independent: each has its own prompt, guidance, noise, sampler and place in it.

- `batch`: the arrays of a batch. `text`, `loop`, `autoencoder`: the three functions, and `encode`.
- `guidance`: one call of the denoiser in the loop. `noise`: random numbers by row and step. `tiling`: large pictures.
- `compiled`: the same functions as programs that all pipelines share.
"""

from sdjax.generation.autoencoder import PIXELS_AT_ONCE, decode, encode
from sdjax.generation.batch import Batch, Conditioning, Control, Known, Table, put_row, stack_tables, start_state
from sdjax.generation.loop import denoise
from sdjax.generation.noise import START_NOISE, draw_noise
from sdjax.generation.text import Tokens, encode_prompt
from sdjax.models import Text

__all__ = [
    "PIXELS_AT_ONCE",
    "START_NOISE",
    "Batch",
    "Conditioning",
    "Control",
    "Known",
    "Table",
    "Text",
    "Tokens",
    "decode",
    "denoise",
    "draw_noise",
    "encode",
    "encode_prompt",
    "put_row",
    "stack_tables",
    "start_state",
]
