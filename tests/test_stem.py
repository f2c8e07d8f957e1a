"""The filter bank of `tiny` against SciPy's convolution, and what its energies do and do not depend on."""

import numpy as np
import pytest
from scipy.ndimage import convolve

from llb.stem import BORDER, ENERGIES, FLOOR, IMAGENET_MEAN, IMAGENET_STD, ORIENTATIONS, SIGMAS, energies, gabor

IMAGES = np.random.default_rng(0).uniform(0.2, 0.8, (2, 40, 48, 3)).astype(np.float32)


def described(rgb: np.ndarray) -> np.ndarray:
    return np.asarray(energies((rgb - IMAGENET_MEAN) / IMAGENET_STD))  # (B, P, ENERGIES)


def test_energies_equal_a_convolution_pixel_by_pixel():
    grey = IMAGES.astype(np.float64).mean(axis=-1)
    grey = np.stack([(one - one.mean()) / one.std() * 0.2 + 0.5 for one in grey])
    found = described(IMAGES)
    assert found.shape == (2, 5 * 6, ENERGIES)
    index = 0
    for sigma in SIGMAS:
        for orientation in range(ORIENTATIONS):
            kernel = gabor(sigma, np.pi * orientation / ORIENTATIONS)
            for image in range(2):
                real, imaginary = (convolve(grey[image], part, mode="mirror") for part in (kernel.real, kernel.imag))
                energy = np.log(real**2 + imaginary**2 + FLOOR)
                patch = energy[8:16, 16:24]  # row 1, column 2
                np.testing.assert_allclose(found[image, 6 + 2, index], patch.mean(), atol=2e-3)
                np.testing.assert_allclose(found[image, 6 + 2, 24 + index], patch.max(), atol=2e-3)
            index += 1


def test_colours_are_the_patchs_own():
    red, green, blue = np.moveaxis(IMAGES[0, 8:16, 16:24].astype(np.float64), -1, 0)
    scale = 0.2 / IMAGES[0].mean(axis=-1).std()
    opponents = np.stack([red - green, (red + green) / 2 - blue]) * scale
    expected = [*opponents.mean(axis=(1, 2)), *np.log(opponents.var(axis=(1, 2)) + FLOOR)]
    np.testing.assert_allclose(described(IMAGES)[0, 8, 49:], expected, atol=1e-4)


def test_brightness_and_contrast_of_the_whole_image_do_not_matter():
    np.testing.assert_allclose(described(IMAGES), described(0.5 * IMAGES + 0.3), atol=5e-3)


def test_a_constant_image_is_described_by_finite_numbers():
    assert np.isfinite(described(np.full((1, 16, 16, 3), 0.4, np.float32))).all()


@pytest.mark.parametrize("sigma", SIGMAS)
def test_filters_have_unit_energy_and_ignore_constants(sigma):
    kernel = gabor(sigma, 0.3)
    assert kernel.shape == (2 * BORDER + 1,) * 2
    assert abs(kernel.sum()) < 1e-10 and (np.abs(kernel) ** 2).sum() == pytest.approx(1)
