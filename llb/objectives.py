"""What `tiny` can be made to learn from drawn images: four objectives, each a loss for one batch (llb.pretrain).

    known    float16 (B, P, E)   the energies of every patch (llb.stem)
    hidden   bool (B, P)         patches that the encoder does not get to see
    tokens   depth × (B, T, D)   what the encoder makes of the others
    loss     scalar

`energies`   predict the hidden patches' energies; hidden patches enter as a mask token (BEiT, SimMIM).
`mae`        the same, but hidden patches do not enter at all; a small decoder fills them in (MAE, He et al., CVPR
             2022).
`teacher`    `energies`, and predict what a moving average of the encoder, which sees everything, makes of the hidden
             patches (data2vec, Baevski et al., ICML 2022).
`replaced`   `energies`, and tell which of the seen patches were replaced by patches from elsewhere (ELECTRA, Clark et
             al., ICLR 2020).
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from llb.encoder import SPECS, Block, ViT
from llb.stem import ENERGIES

SPEC = SPECS["tiny"]
PATCHES = SPEC.native_grid**2
SEEN_WEIGHT = 0.2  # of seen patches in the loss; hidden ones have 1
MAE_HIDDEN = 0.6  # share of the patches; the same in each image, since shapes are fixed
MAE_DECODER = 2  # blocks
TEACHER_BLOCKS = 3  # the last ones, whose normalised mean is the target
REPLACED = 0.15  # share of the patches

Loss = Callable[[dict, dict, jax.Array, jax.Array], jax.Array]


def hide(key: jax.Array, images: int, lowest: float = 0.2, highest: float = 0.6) -> jax.Array:
    """bool (B, P): 20–60 % of the patches of each image; in half of the images lone patches, in the others blobs."""
    share_key, fine_key, coarse_key, kind_key = jax.random.split(key, 4)
    side = SPEC.native_grid
    share = jax.random.uniform(share_key, (images, 1), minval=lowest, maxval=highest)
    fine = jax.random.uniform(fine_key, (images, side, side))
    coarse = jax.image.resize(jax.random.uniform(coarse_key, (images, 5, 5)), (images, side, side), "linear")
    blobs = jax.random.bernoulli(kind_key, 0.5, (images, 1, 1))
    noise = jnp.where(blobs, coarse + 0.05 * fine, fine).reshape(images, -1)
    return noise.argsort(axis=1).argsort(axis=1) < share * PATCHES


class Predictor(nn.Module):
    """The encoder, and linear heads that are thrown away after pre-training.

    Every objective asks for the heads that it needs: `energies` E, `replaced` E + 1, `teacher` E + D outputs.
    """

    outputs: int = ENERGIES

    @nn.compact
    def __call__(self, known: jax.Array, hidden: jax.Array) -> jax.Array:
        """known: float32 (B, P, E), hidden: bool (B, P) → (B, P, outputs)."""
        x = ViT(SPEC, name="vit")(known, hidden)[-1][:, -PATCHES:]
        x = nn.LayerNorm(1e-6, use_fast_variance=False, name="norm")(x)
        return nn.Dense(self.outputs, name="head")(x)


class MaskedAutoencoder(nn.Module):
    """The encoder sees the visible patches alone; a decoder of two blocks fills in the hidden ones."""

    @nn.compact
    def __call__(self, known: jax.Array, visible: jax.Array) -> jax.Array:
        """known: float32 (B, P, E), visible: int (B, V), which patches are seen → predicted energies (B, P, E)."""
        batch, small = len(known), nn.initializers.truncated_normal(0.02)
        seen = ViT(SPEC, name="vit")(known, visible=visible)[-1][:, -visible.shape[1] :]
        seen = nn.Dense(SPEC.width, name="to_decoder")(nn.LayerNorm(1e-6, use_fast_variance=False, name="norm")(seen))
        x = jnp.broadcast_to(self.param("hidden_token", small, (SPEC.width,)), (batch, PATCHES, SPEC.width))
        x = jax.vmap(lambda x, visible, seen: x.at[visible].set(seen))(x, visible, seen)
        x = x + self.param("positions", small, (PATCHES, SPEC.width))
        for index in range(MAE_DECODER):
            x = Block(SPEC.heads, SPEC.layer_scale, "float32", name=f"decoder_{index}")(x)
        return nn.Dense(ENERGIES, name="head")(nn.LayerNorm(1e-6, use_fast_variance=False, name="decoder_norm")(x))


def _standardised(params: dict, known: jax.Array) -> jax.Array:
    stem = jax.lax.stop_gradient(params["vit"]["stem"])
    return (known - stem["mean"]) / stem["std"]


def _prediction_error(predicted: jax.Array, target: jax.Array, hidden: jax.Array) -> jax.Array:
    """Scalar: Huber, 1.0 on hidden and 0.2 on seen patches. (B, P, n), (B, P, n), (B, P)."""
    error = optax.huber_loss(predicted, target).mean(axis=-1)  # (B, P)
    return (error * jnp.where(hidden, 1.0, SEEN_WEIGHT)).mean()


def energies_loss(params: dict, teacher: dict, known: jax.Array, key: jax.Array) -> jax.Array:
    known = known.astype(jnp.float32)
    hidden = hide(key, len(known))
    predicted = Predictor().apply({"params": params}, known, hidden)
    return _prediction_error(predicted, _standardised(params, known), hidden)


def mae_loss(params: dict, teacher: dict, known: jax.Array, key: jax.Array) -> jax.Array:
    known = known.astype(jnp.float32)
    order = jax.vmap(lambda key: jax.random.permutation(key, PATCHES))(jax.random.split(key, len(known)))
    visible = jnp.sort(order[:, : round((1 - MAE_HIDDEN) * PATCHES)], axis=1)
    predicted = MaskedAutoencoder().apply({"params": params}, known, visible)
    hidden = jax.vmap(lambda visible: jnp.ones(PATCHES, bool).at[visible].set(False))(visible)
    return _prediction_error(predicted, _standardised(params, known), hidden)


def teacher_loss(params: dict, teacher: dict, known: jax.Array, key: jax.Array) -> jax.Array:
    known = known.astype(jnp.float32)
    hidden = hide(key, len(known))
    blocks = ViT(SPEC).apply({"params": jax.lax.stop_gradient(teacher["vit"])}, known)[-TEACHER_BLOCKS:]
    tokens = sum(_unit(block[:, -PATCHES:]) for block in blocks) / TEACHER_BLOCKS
    target = jnp.concatenate([_standardised(params, known), _unit(tokens)], axis=-1)
    predicted = Predictor(ENERGIES + SPEC.width).apply({"params": params}, known, hidden)
    parts = jnp.split(predicted, [ENERGIES], axis=-1), jnp.split(target, [ENERGIES], axis=-1)
    return sum(_prediction_error(*pair, hidden) for pair in zip(*parts))


def _unit(tokens: jax.Array) -> jax.Array:
    """(B, P, D), each channel brought to mean 0 and variance 1 over an image's patches: the target cannot collapse."""
    mean, variance = tokens.mean(axis=1, keepdims=True), tokens.var(axis=1, keepdims=True)
    return (tokens - mean) * jax.lax.rsqrt(variance + 1e-4)


def replaced_loss(params: dict, teacher: dict, known: jax.Array, key: jax.Array) -> jax.Array:
    known = known.astype(jnp.float32)
    hide_key, replace_key = jax.random.split(key)
    hidden = hide(hide_key, len(known), 0.1, 0.4)
    mixed, replaced = replace(replace_key, known)
    predicted = Predictor(ENERGIES + 1).apply({"params": params}, mixed, hidden)
    telling = optax.sigmoid_binary_cross_entropy(predicted[..., -1], replaced.astype(jnp.float32))
    telling = (telling * ~hidden).mean()
    hidden_or_replaced = hidden | replaced
    return _prediction_error(predicted[..., :-1], _standardised(params, known), hidden_or_replaced) + telling


def replace(key: jax.Array, known: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Blobs of patches replaced by what is elsewhere in the same image, or by the same place of another image.

    float32 (B, P, E) → the same, and bool (B, P), which patches were replaced.
    """
    place_key, kind_key, shift_key = jax.random.split(key, 3)
    images, side = len(known), SPEC.native_grid
    replaced = hide(place_key, images, 0.0, 2 * REPLACED)
    square = known.reshape(images, side, side, -1)
    shifts = jax.random.randint(shift_key, (images, 2), 2, side - 1)
    elsewhere = jax.vmap(lambda image, shift: jnp.roll(image, shift, (0, 1)))(square, shifts).reshape(known.shape)
    own = jax.random.bernoulli(kind_key, 0.5, (images, 1, 1)) | (images == 1)  # alone, there is no other image
    source = jnp.where(own, elsewhere, jnp.roll(known, 1, axis=0))
    return jnp.where(replaced[..., None], source, known), replaced


OBJECTIVES: dict[str, Loss] = {
    "energies": energies_loss,
    "mae": mae_loss,
    "teacher": teacher_loss,
    "replaced": replaced_loss,
}


def init(objective: str, key: jax.Array) -> dict:
    """Fresh parameters of what the objective trains: "vit" is the encoder, the rest is thrown away afterwards."""
    known, hidden = jnp.zeros((1, PATCHES, ENERGIES)), jnp.zeros((1, PATCHES), bool)
    if objective == "mae":
        return MaskedAutoencoder().init(key, known, jnp.zeros((1, 1), int))["params"]
    outputs = ENERGIES + {"energies": 0, "teacher": SPEC.width, "replaced": 1}[objective]
    return Predictor(outputs).init(key, known, hidden)["params"]
