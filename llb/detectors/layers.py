"""Layers of trained detectors that are convolutional networks.

images, maps   (B, h, w, C)
patches        (B, h', w', k² C)   the k × k neighbourhood of each position, in a row
convolution    patches · kernel    (k² C, C')
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Margins = tuple[tuple[int, int, int], tuple[int, int, int]]


def patches(x: jax.Array, margins: Margins, size: int, stride: int, dilation: int) -> jax.Array:
    """What a convolution sees at each position: (B, h, w, C) → (B, h', w', size² · C).

    margins: of rows and of columns: zeros before, after, and between.
    """
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *margins, (0, 0, 0)))
    taps = dilation * np.arange(size)
    rows, columns = (np.arange(0, n - taps[-1], stride)[:, None] + taps for n in x.shape[1:3])
    found = x[:, rows[:, None, :, None], columns[None, :, None, :]]  # (B, h', w', size, size, C)
    return found.reshape(*found.shape[:3], -1)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve(x: jax.Array, kernel: jax.Array, stride: int = 1, dilation: int = 1) -> jax.Array:
    """(B, h, w, C), (k, k, C, C'), k odd → float32 (B, ⌈h / stride⌉, ⌈w / stride⌉, C'), centred, zeros around.

    One matrix product. As a convolution, K stacked models would be a grouped one: on a CPU half as fast.
    """
    reach = len(kernel) // 2 * dilation
    found = patches(x, ((reach, reach, 0), (reach, reach, 0)), len(kernel), stride, dilation)
    return jnp.dot(found, kernel.reshape(-1, kernel.shape[-1]), preferred_element_type=jnp.float32)


def _backward(stride: int, dilation: int, kept: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple:
    """With respect to x, also a convolution: with the turned kernel, zeros between the strides. JAX's own backward pass
    would scatter, and keep the patches meanwhile."""
    (x, kernel), size = kept, len(kept[1])
    reach = size // 2 * dilation
    gradient = gradient.astype(x.dtype)
    found = patches(x, ((reach, reach, 0), (reach, reach, 0)), size, stride, dilation)
    of_kernel = jnp.einsum("bhwi,bhwo->io", found, gradient).reshape(kernel.shape)
    ends = (reach + n - 1 - (m - 1) * stride for n, m in zip(x.shape[1:3], gradient.shape[1:3]))
    margins = tuple((reach, end, stride - 1) for end in ends)
    turned = kernel[::-1, ::-1].swapaxes(2, 3).reshape(-1, x.shape[-1])
    return patches(gradient, margins, size, 1, dilation) @ turned, of_kernel


convolve.defvjp(lambda x, kernel, stride, dilation: (convolve(x, kernel, stride, dilation), (x, kernel)), _backward)


def normalised(x: jax.Array, means: nn.Variable, variances: nn.Variable, train: bool) -> jax.Array:
    """BatchNorm over all axes but the last, without its scale and bias. While training, x's own moments are taken, and
    the stored ones follow them. The stored variance is unbiased as PyTorch's; Flax's is not."""
    mean, variance = means.value, variances.value
    if train:
        axes, count = tuple(range(x.ndim - 1)), x[..., 0].size
        mean, variance = x.mean(axes), x.var(axes)
        means.value = 0.9 * means.value + 0.1 * mean
        variances.value = 0.9 * variances.value + 0.1 * variance * count / max(1, count - 1)
    return (x - mean) * jax.lax.rsqrt(variance + 1e-5)


class ConvNorm(nn.Module):
    """A convolution without bias, then BatchNorm. Flax fills the kernel with its standard deviation, a constant:
    `llb.detectors.destseg.init` multiplies that by random numbers, since one draw for all kernels compiles faster."""

    width: int
    size: int = 3
    stride: int = 1
    dilation: int = 1
    scale: float = 1.0  # γ at the start
    fan_in: bool = False  # the kernel's deviation at the start is PyTorch's default, else He's for the fan out
    precision: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        shape = (self.size, self.size, x.shape[-1], self.width)
        variance = 1 / (3 * np.prod(shape[:3])) if self.fan_in else 2 / (self.size**2 * self.width)
        kernel = self.param("kernel", nn.initializers.constant(variance**0.5), shape)
        scale = self.param("scale", nn.initializers.constant(self.scale), (self.width,))
        bias = self.param("bias", nn.initializers.zeros, (self.width,))
        means = self.variable("batch_stats", "mean", jnp.zeros, (self.width,))
        variances = self.variable("batch_stats", "variance", jnp.ones, (self.width,))
        x = convolve(x.astype(self.precision), kernel.astype(self.precision), self.stride, self.dilation)
        return normalised(x, means, variances, train) * scale + bias
