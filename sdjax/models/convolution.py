"""How a convolution is computed: the one place that chooses its form."""

from jax import Array, lax


def conv2d(x: Array, kernel: Array, *, stride: int, padding: tuple[int, int]) -> Array:
    """Convolve channels-last.

    Args:
        x: (batch, height, width, in).
        kernel: (size, size, in, out), of x's dtype.
        stride: of both axes.
        padding: zeros before and after, of both axes.

    Returns:
        (batch, height', width', out) in x's dtype.
    """
    if kernel.shape[:2] == (1, 1) and stride == 1 and padding == (0, 0):
        return x @ kernel[0, 0]  # a pointwise convolution is a matrix product
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), (padding, padding), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
