"""`tiny`'s patch embedding: a fixed bank of Gabor filters, then one learned linear layer.

A small ViT with a learned convolution, trained for minutes, never becomes precise at low contrast. The energies of a
filter bank are precise from the start (a scattering front end: Bruna and Mallat, TPAMI 2013). The ViT learns context on
top of them.

    images    float32 (B, H, W, 3), ImageNet-normalised
    grey      (B, H, W), each image brought to mean 0.5 and standard deviation 0.2
    energies  (B, P, E = 53): for each of 24 filters the patch's mean and maximum of log |response|², 48 in all; the
              patch's mean; for two opponent colours the patch's mean and the logarithm of its variance
    patches   (B, P, D)
"""

from functools import lru_cache

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from llb.images import IMAGENET_MEAN, IMAGENET_STD

SIGMAS = (1.2, 2.4, 4.8)  # pixels
ORIENTATIONS = 8
WAVELENGTH = 2.5  # in sigmas: about 0.9 octaves of bandwidth
BORDER = 16  # pixels of mirrored border, beyond three of the largest sigmas
FLOOR = 1e-5  # below the energy of sensor noise: bounds the logarithm where there is no energy
ENERGIES = 2 * len(SIGMAS) * ORIENTATIONS + 1 + 4


def gabor(sigma: float, angle: float) -> np.ndarray:
    """A Gabor filter of unit energy without response to a constant: complex128 (33, 33), a quadrature pair.

    sigma: standard deviation of the Gaussian, in pixels; angle: direction of the wave, in radians.
    """
    y, x = np.mgrid[-BORDER : BORDER + 1, -BORDER : BORDER + 1]
    envelope = np.exp(-(x**2 + y**2) / (2 * sigma**2))
    wave = np.exp(2j * np.pi / (WAVELENGTH * sigma) * (x * np.cos(angle) + y * np.sin(angle)))
    kernel = envelope * (wave - (envelope * wave).sum() / envelope.sum())
    return kernel / np.sqrt((np.abs(kernel) ** 2).sum())


@lru_cache
def transfer_functions(height: int, width: int) -> np.ndarray:
    """complex64 (24, height, width): the bank's discrete Fourier transforms, centred at pixel (0, 0)."""
    filters = [gabor(sigma, np.pi * index / ORIENTATIONS) for sigma in SIGMAS for index in range(ORIENTATIONS)]
    padded = np.zeros((len(filters), height, width), complex)
    padded[:, : 2 * BORDER + 1, : 2 * BORDER + 1] = filters
    return np.fft.fft2(np.roll(padded, (-BORDER, -BORDER), (1, 2))).astype(np.complex64)


def standardise(images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Undo ImageNet's normalisation and bring each image's grey values to mean 0.5 and standard deviation 0.2.

    float32 (B, H, W, 3) → grey (B, H, W), opponent colours (B, H, W, 2): red − green and yellow − blue, equally scaled.
    """
    rgb = images * IMAGENET_STD + IMAGENET_MEAN
    grey = rgb.mean(axis=-1)
    mean = grey.mean(axis=(1, 2), keepdims=True)
    # bounded, since a constant image has no texture to amplify
    scale = 0.2 / jnp.maximum(grey.std(axis=(1, 2), keepdims=True), 0.01)
    red, green, blue = jnp.moveaxis(rgb, -1, 0)
    opponents = jnp.stack([red - green, (red + green) / 2 - blue], axis=-1)
    return (grey - mean) * scale + 0.5, opponents * scale[..., None]


def pool(x: jax.Array, patch: int) -> jax.Array:
    """(B, H, W, …) → (B, P, patch², …): the pixels of each patch."""
    batch, height, width, *rest = x.shape
    x = x.reshape(batch, height // patch, patch, width // patch, patch, *rest)
    return jnp.moveaxis(x, 2, 3).reshape(batch, height // patch * (width // patch), patch * patch, *rest)


def energies(images: jax.Array, patch: int = 8) -> jax.Array:
    """The fixed description of each patch, see above: float32 (B, H, W, 3), ImageNet-normalised → (B, P, ENERGIES)."""
    grey, opponents = standardise(images)
    _, height, width = grey.shape
    padded = jnp.pad(grey, ((0, 0), (BORDER, BORDER), (BORDER, BORDER)), mode="reflect")
    bank = transfer_functions(height + 2 * BORDER, width + 2 * BORDER)
    response = jnp.fft.ifft2(jnp.fft.fft2(padded)[:, None] * bank)[..., BORDER:-BORDER, BORDER:-BORDER]
    log_energy = jnp.log(response.real**2 + response.imag**2 + FLOOR)  # (B, 24, H, W)
    log_energy = pool(jnp.moveaxis(log_energy, 1, -1), patch)  # (B, P, patch², 24)
    colour = pool(opponents, patch)  # (B, P, patch², 2)
    parts = [log_energy.mean(axis=2), log_energy.max(axis=2), pool(grey, patch).mean(axis=2, keepdims=True)]
    parts += [colour.mean(axis=2), jnp.log(colour.var(axis=2) + FLOOR)]
    return jnp.concatenate(parts, axis=-1)


class FilterBankStem(nn.Module):
    """Energies float32 (B, P, ENERGIES) → patches (B, P, width): standardised by fixed statistics, then a linear layer.

    "mean" and "std" are the statistics of the energies over drawn images. Pre-training sets them once.
    """

    width: int

    @nn.compact
    def __call__(self, patch_energies: jax.Array) -> jax.Array:
        mean = self.param("mean", nn.initializers.zeros, (ENERGIES,))
        std = self.param("std", nn.initializers.ones, (ENERGIES,))
        x = (patch_energies - jax.lax.stop_gradient(mean)) / jax.lax.stop_gradient(std)
        return nn.Dense(self.width, name="dense")(x)
