"""How a program runs on the devices at hand, and on those that it is compiled for elsewhere.

Nothing here knows a model. Skip it at first reading: everything above is written as if there were one device.

- `target`: the kind of device that a program is traced for.
- `programs`: `jax.jit` with the options that save memory.
- `rows`: functions of a batch, row by row where the device wants it so, and over a mesh.
- `sharding`: meshes, and which array lies where.
- `staging`: a function split by what its parts depend on, so that a loop computes only what changes.
- `xla_flags`: flags that help, set before JAX starts.
"""
