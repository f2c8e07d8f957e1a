"""Painted damage: images with defects that are known pixel by pixel, new ones at each step, under jit and vmap.

Source: DRAEM's synthesis (Zavrtanik et al., ICCV 2021, section 3.3) as DeSTSeg sets it (Zhang et al., CVPR 2023,
section 3.1). A mask M cut out of Perlin noise says where; a texture A is blended into the image I there:

    noise    (S, S)        Perlin noise with 2⁰ … 2⁵ periods along each axis, turned by −90° … 90°, within −1 … 1
    M        (S, S)        noise > ½; it may be empty
    A        (S, S, 3)     a part of another image of the batch, or drawn noise
    damaged  (S, S, 3)     I · (1 − M) + ((1 − β) · A + β · I) · M, with β from U(0, 0.8)

Differs from the release: A is no photograph of the Describable Textures Dataset, a download, but a crop of another
training image, flipped, with other contrast and brightness, or a sum of octaves of noise. In half of the
cases all channels change alike, so that colour alone does not give damage away. The noise is computed at
the turned positions; the release turns its pixels.
"""

import jax
import jax.numpy as jnp
import numpy as np

from llb.detectors.common import resize

OCTAVES = 6  # periods along an axis: 2⁰ … 2⁵
LATTICE = 2 ** (OCTAVES - 1) + 1  # corners along an axis, where there are the most periods
THRESHOLD = 0.5  # of the noise
BLEND = 0.8  # highest β
SCALARS = 20  # random numbers of an image, besides those of the lattice and of the drawn texture


def perlin(periods: jax.Array, turn: jax.Array, angles: jax.Array, side: int) -> jax.Array:
    """Perlin noise: gradients on a lattice, faded into each other; float32 (side, side), 0 in turned-in corners.

    periods: (2,), powers of two; fewer periods use a part of the lattice, so one program does for all.
    turn: of the whole, in radians; angles: of the gradients, (LATTICE, LATTICE).
    """
    centred = (jnp.arange(side) + 0.5) / side - 0.5
    y, x = centred[:, None], centred[None, :]
    place = jnp.stack([jnp.cos(turn) * y - jnp.sin(turn) * x, jnp.sin(turn) * y + jnp.cos(turn) * x]) + 0.5
    inside = ((place >= 0) & (place < 1)).all(axis=0)
    place = place.clip(0, 1 - 1e-6) * periods[:, None, None]  # (2, side, side), in cells
    cell = jnp.floor(place).astype(jnp.int32)
    within = place - cell
    fade = within**3 * (within * (within * 6 - 15) + 10)
    noise = jnp.zeros((side, side))
    for row in (0, 1):
        for column in (0, 1):
            angle = angles[cell[0] + row, cell[1] + column]
            slope = jnp.sin(angle) * (within[0] - row) + jnp.cos(angle) * (within[1] - column)
            weight = (fade[0] if row else 1 - fade[0]) * (fade[1] if column else 1 - fade[1])
            noise += weight * slope
    return jnp.where(inside, jnp.sqrt(2.0) * noise, 0.0)


def crop(image: jax.Array, size: jax.Array, start: jax.Array, flip: jax.Array) -> jax.Array:
    """A square of an image, shown as large as the image. size, start (2,): in parts of the side; flip: bool (2,)."""
    steps = (jnp.arange(len(image)) + 0.5) / len(image)
    steps = jnp.where(flip[:, None], steps[::-1], steps)  # (2, side)
    rows, columns = ((start[:, None] + size * steps) * len(image)).astype(jnp.int32)
    return image[rows][:, columns]


def grids_of(side: int) -> list[int]:
    """Of the octaves of a drawn texture: 2, 4 … up to the largest power of two that the side holds."""
    return [2**octave for octave in range(1, side.bit_length())]


def octaves(numbers: jax.Array, slope: jax.Array, side: int) -> jax.Array:
    """A sum of random grids, each interpolated: float32 (side, side, 3), mean 0, standard deviation about 1.

    numbers: uniform in −1 … 1, three for each cell; slope: from −1, coarse blots, to 1, fine grain.
    """
    grids = grids_of(side)
    amplitudes = jnp.array(grids) ** slope
    amplitudes *= 2.6 / jnp.sqrt((amplitudes**2).sum())  # √3, and interpolation takes about a third
    cells = jnp.split(numbers.reshape(-1, 3), np.cumsum([grid**2 for grid in grids])[:-1])
    layers = (resize(own.reshape(1, grid, grid, 3), side, side)[0] for own, grid in zip(cells, grids))
    return sum(amplitude * layer for amplitude, layer in zip(amplitudes, layers))


def damage(key: jax.Array, images: jax.Array, noise_share: float) -> tuple[jax.Array, jax.Array]:
    """Paint damage into each image of a batch.

    Args:
        images: float32 (B, S, S, 3) within 0 … 1.
        noise_share: how often a texture is drawn noise; else it comes from another image of the batch.

    Returns:
        the damaged images, equal to `images` outside of the masks; the masks, bool (B, S, S).
    """
    batch, side = images.shape[:2]
    sizes = (SCALARS, LATTICE**2, 3 * sum(grid**2 for grid in grids_of(side)))
    numbers = jax.random.uniform(key, (batch, sum(sizes)))  # one draw, since each draw takes long to compile

    def one(index: jax.Array, numbers: jax.Array) -> tuple[jax.Array, jax.Array]:
        image, (scalars, angles, cells) = images[index], jnp.split(numbers, np.cumsum(sizes)[:-1])
        turn, beta, drawn, grey, other, size, slope, contrast = scalars[:8]
        periods, start, flip, gain, shift = jnp.split(scalars[8:], (2, 4, 6, 9))
        angles = 2 * jnp.pi * angles.reshape(LATTICE, LATTICE)
        mask = perlin(2.0 ** jnp.floor(OCTAVES * periods), jnp.pi * (turn - 0.5), angles, side) > THRESHOLD

        size = 0.5 + 0.5 * size
        other = images[(index + 1 + jnp.int32(other * (batch - 1))) % batch]  # of a single image: itself
        part, noise = crop(other, size, (1 - size) * start, flip < 0.5), octaves(2 * cells - 1, 2 * slope - 1, side)
        gain, shift, noise = (jnp.where(grey < 0.5, x[..., :1], x) for x in (2 * gain - 1, 2 * shift - 1, noise))
        mean = part.mean(axis=(0, 1))
        of_image = mean + 0.3 * shift + (1 + 0.5 * gain) * (part - mean)
        of_noise = 0.5 + 0.5 * shift + (0.05 + 0.35 * contrast) * noise
        texture = jnp.where(drawn < noise_share, of_noise, of_image).clip(0, 1)
        beta = BLEND * beta
        return jnp.where(mask[..., None], (1 - beta) * texture + beta * image, image), mask

    return jax.vmap(one)(jnp.arange(batch), numbers)
