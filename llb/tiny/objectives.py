"""The four pre-training objectives of `tiny`. Each is a loss of one batch of drawn images (see llb/tiny/pretrain.py).

    energies   float16 (B, P, E)   filter-bank energies of every patch (llb/encoders/stem.py)
    hidden     bool (B, P)         patches that the encoder does not see
    tokens     depth × (B, T, D)   the encoder's output after every block
    loss       scalar

`energies`   Predict the energies of the hidden patches. A mask token takes their place (BEiT, SimMIM).
`mae`        The same, but the encoder gets only the visible patches; a small decoder predicts the hidden ones
             (MAE, He et al., CVPR 2022).
`teacher`    `energies`, and predict the tokens of the hidden patches that a teacher computes from the whole image. The
             teacher is a moving average of the encoder (data2vec, Baevski et al., ICML 2022).
`replaced`   `energies`, and tell which visible patches were replaced by patches from elsewhere (ELECTRA, Clark et al.,
             ICLR 2020).
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from llb.encoders.specs import SPECS
from llb.encoders.stem import ENERGIES
from llb.encoders.vit import Block, ViT

SPEC = SPECS["tiny"]
GRID = (SPEC.native_grid, SPEC.native_grid)  # rows, columns of patches
PATCHES = SPEC.native_grid**2
VISIBLE_WEIGHT = 0.2  # of visible patches in the loss; hidden patches have weight 1
MAE_HIDDEN = 0.6  # share of the patches; the same in every image, because shapes are fixed
MAE_DECODER = 2  # blocks
TEACHER_BLOCKS = 3  # the target is the mean of the last blocks' normalised tokens
REPLACED = 0.15  # share of the patches, on average

Loss = Callable[[dict, dict, jax.Array, jax.Array], jax.Array]  # (params, teacher's params, energies, key) → scalar


def hide_patches(key: jax.Array, images: int, lowest: float = 0.2, highest: float = 0.6) -> jax.Array:
    """Choose the hidden patches: in half of the images single patches, in the others connected regions.

    Args:
        images: their number, B.
        lowest, highest: the share of hidden patches is drawn between these, for each image.

    Returns:
        bool (B, P).
    """
    share_key, fine_key, coarse_key, kind_key = jax.random.split(key, 4)
    share = jax.random.uniform(share_key, (images, 1), minval=lowest, maxval=highest)
    fine = jax.random.uniform(fine_key, (images, *GRID))
    coarse = jax.image.resize(jax.random.uniform(coarse_key, (images, 5, 5)), (images, *GRID), "linear")
    regions = jax.random.bernoulli(kind_key, 0.5, (images, 1, 1))
    noise = jnp.where(regions, coarse + 0.05 * fine, fine).reshape(images, -1)
    ranks = noise.argsort(axis=1).argsort(axis=1)
    return ranks < share * PATCHES


def replace_patches(key: jax.Array, energies: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Replace regions by another part of the same image, or by the same part of another image.

    Args:
        energies: float32 (B, P, E).

    Returns:
        the mixed energies, float32 (B, P, E); the replaced patches, bool (B, P).
    """
    place_key, kind_key, shift_key = jax.random.split(key, 3)
    images = len(energies)
    replaced = hide_patches(place_key, images, 0.0, 2 * REPLACED)
    square = energies.reshape(images, *GRID, -1)
    shifts = jax.random.randint(shift_key, (images, 2), 2, SPEC.native_grid - 1)
    shifted = jax.vmap(lambda image, shift: jnp.roll(image, shift, (0, 1)))(square, shifts).reshape(energies.shape)
    # a batch of one image has no other image
    from_same_image = jax.random.bernoulli(kind_key, 0.5, (images, 1, 1)) | (images == 1)
    source = jnp.where(from_same_image, shifted, jnp.roll(energies, 1, axis=0))
    return jnp.where(replaced[..., None], source, energies), replaced


class Predictor(nn.Module):
    """The encoder and a linear head, which only pre-training uses.

    Outputs of the head: E for `energies`, E + 1 for `replaced`, E + D for `teacher`.
    """

    outputs: int = ENERGIES

    @nn.compact
    def __call__(self, energies: jax.Array, hidden: jax.Array) -> jax.Array:
        """energies: float32 (B, P, E), hidden: bool (B, P) → float32 (B, P, outputs)."""
        x = ViT(SPEC, name="vit")(energies, GRID, mask=hidden)[-1][:, -PATCHES:]
        x = nn.LayerNorm(1e-6, use_fast_variance=False, name="norm")(x)
        return nn.Dense(self.outputs, name="head")(x)


class MaskedAutoencoder(nn.Module):
    """The encoder of the visible patches, and a decoder of two blocks that predicts all patches."""

    @nn.compact
    def __call__(self, energies: jax.Array, visible: jax.Array) -> jax.Array:
        """energies: float32 (B, P, E), visible: int (B, V), numbers of the visible patches → float32 (B, P, E)."""
        batch, small = len(energies), nn.initializers.truncated_normal(0.02)
        tokens = ViT(SPEC, name="vit")(energies, GRID, visible=visible)[-1][:, -visible.shape[1] :]
        tokens = nn.LayerNorm(1e-6, use_fast_variance=False, name="norm")(tokens)
        tokens = nn.Dense(SPEC.width, name="to_decoder")(tokens)
        x = jnp.broadcast_to(self.param("hidden_token", small, (SPEC.width,)), (batch, PATCHES, SPEC.width))
        x = jax.vmap(lambda x, visible, tokens: x.at[visible].set(tokens))(x, visible, tokens)
        x = x + self.param("positions", small, (PATCHES, SPEC.width))
        for index in range(MAE_DECODER):
            x = Block(SPEC.heads, SPEC.layer_scale, "float32", name=f"decoder_{index}")(x)
        return nn.Dense(ENERGIES, name="head")(nn.LayerNorm(1e-6, use_fast_variance=False, name="decoder_norm")(x))


def init_params(objective: str, key: jax.Array) -> dict:
    """Initial parameters of an objective's model: "vit" is the encoder, only pre-training uses the others."""
    energies, hidden = jnp.zeros((1, PATCHES, ENERGIES)), jnp.zeros((1, PATCHES), bool)
    if objective == "mae":
        return MaskedAutoencoder().init(key, energies, jnp.zeros((1, 1), int))["params"]
    outputs = ENERGIES + {"energies": 0, "teacher": SPEC.width, "replaced": 1}[objective]
    return Predictor(outputs).init(key, energies, hidden)["params"]


# ---- the losses ----


def energies_loss(params: dict, teacher: dict, energies: jax.Array, key: jax.Array) -> jax.Array:
    energies = energies.astype(jnp.float32)
    hidden = hide_patches(key, len(energies))
    predicted = Predictor().apply({"params": params}, energies, hidden)
    return _prediction_error(predicted, _standardised(params, energies), hidden)


def mae_loss(params: dict, teacher: dict, energies: jax.Array, key: jax.Array) -> jax.Array:
    energies = energies.astype(jnp.float32)
    order = jax.vmap(lambda key: jax.random.permutation(key, PATCHES))(jax.random.split(key, len(energies)))
    visible = jnp.sort(order[:, : round((1 - MAE_HIDDEN) * PATCHES)], axis=1)
    predicted = MaskedAutoencoder().apply({"params": params}, energies, visible)
    hidden = jax.vmap(lambda visible: jnp.ones(PATCHES, bool).at[visible].set(False))(visible)
    return _prediction_error(predicted, _standardised(params, energies), hidden)


def teacher_loss(params: dict, teacher: dict, energies: jax.Array, key: jax.Array) -> jax.Array:
    energies = energies.astype(jnp.float32)
    hidden = hide_patches(key, len(energies))
    blocks = ViT(SPEC).apply({"params": jax.lax.stop_gradient(teacher["vit"])}, energies, GRID)[-TEACHER_BLOCKS:]
    tokens = sum(normalise_channels(block[:, -PATCHES:]) for block in blocks) / TEACHER_BLOCKS
    predicted = Predictor(ENERGIES + SPEC.width).apply({"params": params}, energies, hidden)
    predicted_energies, predicted_tokens = jnp.split(predicted, [ENERGIES], axis=-1)
    energies_error = _prediction_error(predicted_energies, _standardised(params, energies), hidden)
    return energies_error + _prediction_error(predicted_tokens, normalise_channels(tokens), hidden)


def replaced_loss(params: dict, teacher: dict, energies: jax.Array, key: jax.Array) -> jax.Array:
    energies = energies.astype(jnp.float32)
    hide_key, replace_key = jax.random.split(key)
    hidden = hide_patches(hide_key, len(energies), 0.1, 0.4)
    mixed, replaced = replace_patches(replace_key, energies)
    predicted = Predictor(ENERGIES + 1).apply({"params": params}, mixed, hidden)
    detection_error = optax.sigmoid_binary_cross_entropy(predicted[..., -1], replaced.astype(jnp.float32))
    detection_error = (detection_error * ~hidden).mean()
    return _prediction_error(predicted[..., :-1], _standardised(params, energies), hidden | replaced) + detection_error


OBJECTIVES: dict[str, Loss] = {
    "energies": energies_loss,
    "mae": mae_loss,
    "teacher": teacher_loss,
    "replaced": replaced_loss,
}


def _standardised(params: dict, energies: jax.Array) -> jax.Array:
    stem = jax.lax.stop_gradient(params["vit"]["stem"])
    return (energies - stem["mean"]) / stem["std"]


def _prediction_error(predicted: jax.Array, target: jax.Array, hidden: jax.Array) -> jax.Array:
    """Mean Huber loss, weighted by 1 for hidden and 0.2 for visible patches.

    predicted, target: (B, P, n), hidden: bool (B, P) → scalar.
    """
    error = optax.huber_loss(predicted, target).mean(axis=-1)  # (B, P)
    return (error * jnp.where(hidden, 1.0, VISIBLE_WEIGHT)).mean()


def normalise_channels(tokens: jax.Array) -> jax.Array:
    """Scale each channel to mean 0 and variance 1 over an image's patches, so that the target cannot collapse.

    tokens: (B, P, D) → (B, P, D).
    """
    mean, variance = tokens.mean(axis=1, keepdims=True), tokens.var(axis=1, keepdims=True)
    return (tokens - mean) * jax.lax.rsqrt(variance + 1e-4)
