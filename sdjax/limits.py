"""What can be asked for: limits of the library, the command line and the server, in one place.

A side of a picture is a multiple of the autoencoder's factor, and steps go up to the timesteps that the model was
trained with: these two come from the checkpoint, and hold everywhere. A job shares its server with others, and so has
tighter limits: `JOB_...`.
"""

MAX_SIDE = 2048
"""Pixels of a side."""
LAST_SEED = 2**64 - 1

JOB_STEPS = 150
JOB_GUIDANCE = 20.0
JOB_IMAGES = 8
JOB_LORAS = 8
JOB_LORA_WEIGHT = 10.0
JOB_PROMPT = 10_000
"""Characters."""
JOB_LEAST_SIDE = 256
"""Pixels of a side; a model of smaller pictures has its own size."""
JOB_MULTIPLE = 8
"""Pixels that a side is a multiple of."""
