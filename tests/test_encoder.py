"""Encoders equal transformers' after every block, with weights under transformers' names and the original releases'.

The reference values are made by tests/reference/make_encoder.py.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from reference.encoder_weights import FAMILIES, SIZES, draw, images, in_memory, kept, original, saved

from llb.config import PRECISIONS
from llb.encoder import (
    SPECS,
    Encoder,
    Spec,
    attention,
    interpolate_positions,
    interpolation_matrix,
    load_encoder,
    parameter_shapes,
)
from llb.files import UserError

REFERENCE = Path(__file__).parent / "reference"
STORED = dict(np.load(REFERENCE / "encoder.npz"))


def released(family: str) -> dict[str, np.ndarray]:
    """The weights by the names of the original release."""
    return original(saved(family))


@pytest.fixture(autouse=True)
def small_specs(monkeypatch):
    for name, about in FAMILIES.items():
        spec = Spec(name, **about, antialias=about["registers"] > 0, image_size=SIZES[name][0], groups=((0,), (1,)))
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


@pytest.mark.parametrize("named", (saved, released, in_memory))
@pytest.mark.parametrize("family, size", [(family, size) for family, sizes in SIZES.items() for size in sizes])
def test_tokens_of_every_block_equal_transformers(tmp_path, family, size, named):
    file = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(named(family), file)
    assert_tokens_equal_the_reference(load_encoder(family, file, size))


@pytest.mark.parametrize("file", ("encoder_zip.pth", "encoder_legacy.pth"))
def test_tokens_from_a_pth_file_of_either_format_equal_transformers(file):
    assert_tokens_equal_the_reference(load_encoder("stored", REFERENCE / file))


@pytest.mark.parametrize("antialias", (False, True))
@pytest.mark.parametrize(
    "native, rows, columns", ((37, 28, 28), (37, 16, 28), (37, 41, 41), (14, 24, 24), (14, 10, 10))
)
def test_interpolated_positions_equal_pytorch(native, rows, columns, antialias):
    grid = draw(f"images {native}", (1, 1, native, native))
    positions = jnp.concatenate([jnp.full((1, 1), 7.0), grid.reshape(-1, 1)])
    spec = Spec("", 1, 1, 1, 1, 0, False, native, antialias, native, ())
    outcome = np.asarray(interpolate_positions(positions, rows, columns, spec))
    assert outcome[0] == 7.0  # the class token's is left alone
    expected = STORED[f"interpolated/{native}/{rows}/{columns}/{antialias}"]
    np.testing.assert_allclose(outcome[1:].reshape(rows, columns), expected, atol=2e-6)


def test_at_the_native_grid_positions_are_the_stored_ones_bit_for_bit():
    positions = jnp.asarray(draw("images", (1 + 37**2, 3)))
    np.testing.assert_array_equal(interpolate_positions(positions, 37, 37, SPECS["dinov2_vits14"]), positions)


def test_the_docstring_tells_how_far_the_original_releases_offset_leads():
    told = []
    for native, side in ((37, 28), (14, 20)):
        matrix = interpolation_matrix(side, native, antialias=False)
        for kind in ("random", "waves"):
            prefix = f"offset/{native}/{side}/{kind}"
            plain = matrix @ STORED[prefix + "/grid"].astype(np.float64) @ matrix.T
            told.append(100 * np.sqrt(np.mean((STORED[prefix] - plain) ** 2) / np.mean(plain**2)))
    sentence = (
        "In RMS that changes random embeddings by {:.1f} % and waves of two periods a side by {:.1f} % at 392 pixels "
        "for patch 14, by {:.1f} % and {:.1f} % at 320 for patch 16."
    )
    assert sentence.format(*told) in " ".join(interpolate_positions.__doc__.split())


GROUPS = {12: ((2, 3, 4, 5), (6, 7, 8, 9)), 24: ((4, 6, 8, 10), (12, 14, 16, 18))}
TABLE = """
name               patch width depth heads registers scale native antialias size repository
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


@pytest.mark.parametrize("row", [row.split() for row in TABLE.strip().splitlines()[1:]], ids=lambda row: row[0])
def test_each_name_has_its_models_sizes(row):
    name, *numbers, repository = row
    patch, width, depth, heads, registers, scale, native, antialias, size = (
        {"-": False, "yes": True}[word] if word in ("-", "yes") else int(word) for word in numbers
    )
    assert SPECS[name] == Spec(
        name, patch, width, depth, heads, registers, scale, native, antialias, size, GROUPS[depth], repository
    )
    assert size % patch == 0


def test_the_names_are_those_of_the_interface():
    names = {row.split()[0] for row in TABLE.strip().splitlines()[1:]}
    assert set(SPECS) - set(FAMILIES) == names | {"tiny"}


def test_in_bfloat16_the_tokens_stay_float32_and_near():
    random = np.random.default_rng(0)
    pictures = random.normal(0, 1, (2, 56, 56, 3)).astype(np.float32)
    exact, rounded = (load_encoder("tiny", image_size=56, precision=name)(pictures) for name in PRECISIONS)
    for one, other in zip(exact, rounded):
        assert other.dtype == jnp.float32
        assert 1e-5 < np.linalg.norm(one - other) / np.linalg.norm(one) < 2e-2


def test_a_full_size_model_runs_and_gives_the_tokens_of_its_12_blocks():
    spec = SPECS["dinov2_vits14_reg"]
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: random.normal(0, 0.02, leaf.shape).astype(np.float32), parameter_shapes(spec))
    outputs = Encoder(spec, params, 56, "")(random.normal(0, 1, (2, 56, 56, 3)))
    assert [output.shape for output in outputs] == 12 * [(2, 1 + 4 + 16, 384)]
    assert all(np.isfinite(output).all() for output in outputs)


@pytest.mark.parametrize("size, near", ((390, "378 and 392"), (400, "392 and 406"), (13, "14 and 28")))
def test_a_size_that_is_no_multiple_of_the_patch_names_the_nearest(size, near):
    with pytest.raises(UserError, match=f"^--image-size {size} .* 14; near it are {near}$"):
        load_encoder("dinov2_vits14", image_size=size)


def test_an_unknown_encoder_names_the_known_ones():
    with pytest.raises(UserError, match="^--encoder dinov3 is not known; one of tiny, .*dinov2_vitl14_reg"):
        load_encoder("dinov3")


def test_encoders_with_the_same_weights_have_the_same_digest_whatever_the_file(tmp_path):
    safetensors.numpy.save_file(saved("stored"), tmp_path / "one")
    first, second = (load_encoder("stored", file) for file in (tmp_path / "one", REFERENCE / "encoder_zip.pth"))
    assert first.weights_digest == second.weights_digest
    changed = saved("stored")
    changed["encoder.layer.1.mlp.fc2.bias"][0] += 1e-6
    safetensors.numpy.save_file(changed, tmp_path / "other")
    assert load_encoder("stored", tmp_path / "other").weights_digest != first.weights_digest


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 2e-2)])
def test_attention_on_a_cpu_is_that_of_an_accelerator(dtype, tolerance):
    """Written out with the heads first, it gives what jax.nn's gives."""
    random = np.random.default_rng(0)
    q, k, v = (jnp.asarray(random.normal(size=(2, 13, 3, 8)), dtype) for _ in range(3))
    expected = jax.nn.dot_product_attention(q, k, v)
    found = attention(q, k, v)
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(*(np.asarray(y, np.float32) for y in (found, expected)), rtol=tolerance, atol=tolerance)
