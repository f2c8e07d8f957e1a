"""Encoders equal transformers' (reference/make_encoder.py) after every block, and tiny's filter bank SciPy's."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from reference.encoder_weights import FAMILIES, SIZES, draw, images, in_memory, kept, original, saved
from scipy.ndimage import convolve

from llb.encoders import SPECS, Encoder, Spec, load_encoder
from llb.encoders.stem import ENERGIES, FLOOR, ORIENTATIONS, SIGMAS, energies, gabor
from llb.encoders.vit import attention, interpolate_positions
from llb.files import UserError
from llb.images import IMAGENET_MEAN, IMAGENET_STD

REFERENCE = Path(__file__).parent / "reference"
STORED = dict(np.load(REFERENCE / "encoder.npz"))


@pytest.fixture
def small_specs(monkeypatch):
    for name, sizes in FAMILIES.items():
        spec = Spec(name, **sizes, antialias=sizes["registers"] > 0, image_size=SIZES[name][0], groups=((0,), (1,)))
        monkeypatch.setitem(SPECS, name, spec)


def assert_tokens_equal_the_reference(encoder: Encoder):
    family, size = encoder.spec.name, encoder.image_size
    outputs = encoder(images(size))
    assert len(outputs) == FAMILIES[family]["depth"]
    for index, tokens in enumerate(outputs):
        assert tokens.shape == (2, encoder.tokens_per_image, encoder.spec.width)
        expected = STORED[f"{family}/{size}/{index}"]
        error = np.abs(kept(np.asarray(tokens), encoder.spec.registers) - expected).max() / np.abs(expected).max()
        assert error <= 1e-4, f"block {index}: {error:.1e}"


@pytest.mark.parametrize("naming", ("saved", "released", "in memory"))
@pytest.mark.parametrize("family, size", [(family, size) for family, sizes in SIZES.items() for size in sizes])
def test_tokens_of_every_block_equal_transformers(small_specs, tmp_path, family, size, naming):
    tensors = in_memory(family) if naming == "in memory" else saved(family)
    safetensors.numpy.save_file(original(tensors) if naming == "released" else tensors, tmp_path / "weights")
    assert_tokens_equal_the_reference(load_encoder(family, tmp_path / "weights", size))


@pytest.mark.parametrize("file", ("encoder_zip.pth", "encoder_legacy.pth"))
def test_tokens_from_a_pth_file_of_either_format_equal_transformers(small_specs, file):
    assert_tokens_equal_the_reference(load_encoder("stored", REFERENCE / file))


@pytest.mark.parametrize("antialias", (False, True))
@pytest.mark.parametrize(
    "native, rows, columns", ((37, 28, 28), (37, 16, 28), (37, 41, 41), (14, 24, 24), (14, 10, 10))
)
def test_interpolated_positions_equal_pytorch(native, rows, columns, antialias):
    grid = draw(f"images {native}", (1, 1, native, native))
    positions = jnp.concatenate([jnp.full((1, 1), 7.0), grid.reshape(-1, 1)])
    one = dict(patch=1, width=1, depth=1, heads=1, registers=0, layer_scale=False, image_size=native, groups=())
    spec = Spec(name="", native_grid=native, antialias=antialias, **one)
    assert interpolate_positions(positions, native, native, spec) is positions
    outcome = np.asarray(interpolate_positions(positions, rows, columns, spec))
    assert outcome[0] == 7.0  # the class token's stays
    expected = STORED[f"interpolated/{native}/{rows}/{columns}/{antialias}"]
    np.testing.assert_allclose(outcome[1:].reshape(rows, columns), expected, atol=2e-6)


GROUPS = {12: ((2, 3, 4, 5), (6, 7, 8, 9)), 24: ((4, 6, 8, 10), (12, 14, 16, 18))}
COLUMNS = "name patch width depth heads registers layer_scale native_grid antialias image_size repository".split()
TABLE = """
dino_vits16           16   384    12     6         0     -     14         -  384 facebook/dino-vits16
dino_vits8             8   384    12     6         0     -     28         -  392 facebook/dino-vits8
dino_vitb16           16   768    12    12         0     -     14         -  384 facebook/dino-vitb16
dino_vitb8             8   768    12    12         0     -     28         -  392 facebook/dino-vitb8
dinov2_vits14         14   384    12     6         0   yes     37         -  392 facebook/dinov2-small
dinov2_vitb14         14   768    12    12         0   yes     37         -  392 facebook/dinov2-base
dinov2_vitl14         14  1024    24    16         0   yes     37         -  392 facebook/dinov2-large
dinov2_vits14_reg     14   384    12     6         4   yes     37       yes  392 facebook/dinov2-with-registers-small
dinov2_vitb14_reg     14   768    12    12         4   yes     37       yes  392 facebook/dinov2-with-registers-base
dinov2_vitl14_reg     14  1024    24    16         4   yes     37       yes  392 facebook/dinov2-with-registers-large
"""


def test_each_name_has_its_models_sizes():
    expected = {"tiny": SPECS["tiny"]}
    for line in TABLE.strip().splitlines():
        values = [{"-": False, "yes": True}.get(word, int(word) if word.isdigit() else word) for word in line.split()]
        row = dict(zip(COLUMNS, values))
        expected[row["name"]] = Spec(**row, groups=GROUPS[row["depth"]])
    assert {name: spec for name, spec in SPECS.items() if isinstance(spec, Spec)} == expected
    assert not any(spec.image_size % spec.patch for spec in SPECS.values())


@pytest.mark.parametrize("size, near", ((390, "378 or 392"), (400, "392 or 406"), (13, "14 or 28")))
def test_a_size_that_is_no_multiple_of_the_patch_names_the_nearest(size, near):
    with pytest.raises(UserError, match=f"^--image-size {size}: not a multiple .* 14; give {near}$"):
        load_encoder("dinov2_vits14", image_size=size)


def test_an_unknown_encoder_names_the_known_ones():
    with pytest.raises(UserError, match="^--encoder dinov3: unknown encoder; give one of tiny, .*dinov2_vitl14_reg"):
        load_encoder("dinov3")


@pytest.mark.parametrize("name", ("tiny", "dinov2_vits14"))
def test_weights_of_an_empty_name_are_refused(name):
    """An unset variable of the shell; without weights the named ones are taken."""
    with pytest.raises(UserError, match='^--weights "": is empty'):
        load_encoder(name, weights="")


def test_in_bfloat16_the_tokens_stay_float32_and_near():
    pictures = np.random.default_rng(0).normal(0, 1, (2, 56, 56, 3)).astype(np.float32)
    exact, rounded = (load_encoder("tiny", None, 56, precision)(pictures) for precision in ("float32", "bfloat16"))
    for one, other in zip(exact, rounded):
        assert other.dtype == jnp.float32
        assert 1e-5 < np.linalg.norm(one - other) / np.linalg.norm(one) < 2e-2


@pytest.mark.parametrize("dtype, tolerance", (("float32", 1e-6), ("bfloat16", 2e-2)))
def test_attention_on_a_cpu_is_that_of_an_accelerator(dtype, tolerance):
    random = np.random.default_rng(0)
    q, k, v = (jnp.asarray(random.normal(size=(2, 13, 3, 8)), dtype) for _ in range(3))
    own, expected = attention(q, k, v), jax.nn.dot_product_attention(q, k, v)
    assert own.dtype == expected.dtype
    own, expected = np.asarray(own, np.float32), np.asarray(expected, np.float32)
    np.testing.assert_allclose(own, expected, rtol=tolerance, atol=tolerance)


# ---- the filter bank of `tiny` ----

PICTURES = np.random.default_rng(0).uniform(0.2, 0.8, (2, 40, 48, 3)).astype(np.float32)


def energies_of(rgb: np.ndarray) -> np.ndarray:
    return np.asarray(energies((rgb - IMAGENET_MEAN) / IMAGENET_STD))  # (B, P, ENERGIES)


def test_energies_equal_a_convolution_pixel_by_pixel():
    grey = PICTURES.astype(np.float64).mean(axis=-1)
    grey = np.stack([(one - one.mean()) / one.std() * 0.2 + 0.5 for one in grey])
    described = energies_of(PICTURES)
    assert described.shape == (2, 5 * 6, ENERGIES)
    kernels = [gabor(sigma, np.pi * index / ORIENTATIONS) for sigma in SIGMAS for index in range(ORIENTATIONS)]
    for index, kernel in enumerate(kernels):
        assert abs(kernel.sum()) < 1e-10  # a constant is ignored
        assert (np.abs(kernel) ** 2).sum() == pytest.approx(1)
        for image in range(2):
            real, imaginary = (convolve(grey[image], part, mode="mirror") for part in (kernel.real, kernel.imag))
            patch = np.log(real**2 + imaginary**2 + FLOOR)[8:16, 16:24]  # row 1, column 2
            np.testing.assert_allclose(described[image, 6 + 2, index], patch.mean(), atol=2e-3)
            np.testing.assert_allclose(described[image, 6 + 2, 24 + index], patch.max(), atol=2e-3)


def test_colours_are_the_patchs_own():
    red, green, blue = np.moveaxis(PICTURES[0, 8:16, 16:24].astype(np.float64), -1, 0)
    scale = 0.2 / PICTURES[0].mean(axis=-1).std()
    opponents = np.stack([red - green, (red + green) / 2 - blue]) * scale
    expected = [*opponents.mean(axis=(1, 2)), *np.log(opponents.var(axis=(1, 2)) + FLOOR)]
    np.testing.assert_allclose(energies_of(PICTURES)[0, 8, 49:], expected, atol=1e-4)


def test_brightness_and_contrast_of_the_whole_image_do_not_matter():
    np.testing.assert_allclose(energies_of(PICTURES), energies_of(0.5 * PICTURES + 0.3), atol=5e-3)
    assert np.isfinite(energies_of(0 * PICTURES + 0.4)).all()
