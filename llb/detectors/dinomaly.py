"""Dinomaly: ONE anomaly detector that reconstructs the features of a frozen encoder. llb.train stacks K of them.

Source: Guo et al., "Dinomaly: The Less Is More Philosophy in Multi-Class Unsupervised Anomaly Detection" (CVPR 2025,
arXiv 2405.14325), section 3. The idea: a decoder that is trained on normal images reconstructs normal features well and
defects badly. So the cosine distance between a feature and its reconstruction tells how anomalous the position is.

    features (B, G, T, D)       means of G groups of encoder blocks (llb.features); T = class, registers, P patch tokens
    input    (B, T, D)          their mean, which is the mean over all the blocks, since the groups are equally large
    noisy    (B, T, D)          bottleneck: an MLP with dropout, which prevents the decoder from copying its input
    blocks   depth × (B, T, D)  decoder: transformer blocks with linear attention, which cannot focus on one position
    decoded  (B, G, P, D)       "loose" reconstruction: only means of groups of blocks are compared; patch tokens
    distance (B, G, P)          1 − cosine similarity at every position
    map      (B, S, S)          mean of the distances over the groups, upsampled with aligned corners and blurred
    score    (B,)               mean of the map's highest 1 %

G is 2; with groups=one 1, with groups=layers one for each block.

Differs from the release: the attention's denominator gets + 1e-6, so it never is zero. By default images are resized to
392 × 392 (there 448, then the centre), maps are blurred at full size (there at 256, by a 5 × 5 kernel), and positions
are interpolated as in transformers; --protocol dinomaly follows the release in these three.
"""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from llb.detectors.common import MapRule, Setup, between, choice, cosine_distance, highest_part
from llb.detectors.decoder import Dinomaly
from llb.detectors.recipes import RECIPES, Recipe, hard_positions, make_optimizer
from llb.encoders.specs import Spec
from llb.files import UserError

JITTER = 20.0  # scale of the noise "jitter", UniAD's
STEP_ARRAYS = 25  # float32 (T, D) that a step needs at the least for each decoder block and image: XLA reports 33 to 36

STRIDES = ()  # it reconstructs tokens of a ViT
MAP, SCORE, AGGREGATE = MapRule(align_corners=True, sigma=4.0), "top-1%", "mean"
STANDARDISE = False  # the paper averages the scores as they are


@dataclass(frozen=True)
class Settings:
    """Dinomaly's own ablations; the defaults are the published detector."""

    recipe: str = choice("dinomaly", "llbnad")
    dropout: float = between(0.2, 0, 1)  # rate in the bottleneck
    attention: str = choice("linear", "softmax")  # of the decoder
    groups: str = choice("two", "one", "layers")  # whose means are compared; layers: each block by itself
    noise: str = choice("dropout", "jitter")  # jitter: UniAD's, on the bottleneck's input, in place of the dropout
    class_token: str = choice("keep", "subtract", "drop")  # subtract it from the patches, as Dinomaly2 does
    easy_fraction: float | None = between(None, 0, 1)  # p of the hard mining; None: the recipe's
    easy_factor: float | None = between(None, 0, 1)  # of the easy positions' gradient; None: the recipe's

    @property
    def learning_rate(self) -> float:
        return RECIPES[self.recipe].learning_rate


def patch_targets(features: jax.Array, patches: int) -> jax.Array:
    """The reconstruction's target: (B, G, T, D) → float32 (B, G, P, D), class and register tokens dropped."""
    return features[:, :, -patches:].astype(jnp.float32)


@jax.custom_vjp
def scale_gradient(x: jax.Array, factor: jax.Array) -> jax.Array:
    """The identity, whose gradient with respect to x is multiplied by `factor` (broadcast over x)."""
    return x


scale_gradient.defvjp(
    lambda x, factor: (x, factor),
    lambda factor, gradient: (gradient * factor, jnp.zeros_like(factor)),
)


def reconstruction_loss(decoded: jax.Array, target: jax.Array, hard: jax.Array, factor: float) -> tuple:
    """Global cosine loss with hard mining (Dinomaly, eq. 3–4).

    In each group, all P · D feature values of an image form one vector, and the loss is 1 − cosine between the decoded
    and the encoder's vector. At positions that are already reconstructed well the gradient is multiplied by `factor`:
    more training there would teach the decoder to reconstruct defects as well.

    Args:
        decoded, target: float32 (B, G, P, D).
        hard: int scalar ≥ 1; in each group, of the B · P positions of the batch, the `hard` ones with the largest
            distance keep their gradient, and so do positions tied with the last of them.
        factor: multiplies the gradient at the other positions.

    Returns:
        scalar: the mean over groups and images of 1 − cosine similarity; and the distance at each position, (B, G, P).
    """
    batch, groups, patches, width = decoded.shape
    distance = cosine_distance(jax.lax.stop_gradient(decoded), target)  # (B, G, P)
    # Compared in sorted order, and sorted back: XLA may compute `distance` twice and round it differently, so that a
    # threshold taken from one copy would miss its own position in the other.
    flat = distance.transpose(1, 0, 2).reshape(groups, batch * patches)
    nearness, place = jax.lax.sort((-flat, jax.lax.broadcasted_iota(jnp.int32, flat.shape, 1)), num_keys=1)
    threshold = jax.lax.dynamic_index_in_dim(nearness, hard - 1, axis=-1)  # (G, 1)
    _, weight = jax.lax.sort((place, jnp.where(nearness > threshold, factor, 1.0)), num_keys=1)
    weight = weight.reshape(groups, batch, patches).transpose(1, 0, 2)
    decoded = scale_gradient(decoded, weight[..., None])
    vectors = (batch, groups, patches * width)
    return cosine_distance(decoded.reshape(vectors), target.reshape(vectors)).mean(), distance


# ---- the detector, as llb.detectors describes it ----


def network(setup: Setup) -> Dinomaly:
    """Dinomaly in the size of the encoder: as many decoder blocks as encoder blocks are reconstructed, equal heads."""
    spec, settings = setup.spec, setup.settings
    if not hasattr(spec, "heads"):
        raise UserError(f"--detector dinomaly reconstructs tokens of a ViT, and {spec.name} is a CNN; choose another")
    return Dinomaly(
        depth=sum(len(group) for group in spec.groups),
        heads=spec.heads,
        patches=patches_of(setup),
        dropout=settings.dropout if settings.noise == "dropout" else 0.0,
        linear_init=RECIPES[settings.recipe].linear_init,
        precision=setup.precision,
        attention=settings.attention,
    )


def patches_of(setup: Setup) -> int:
    return setup.grids[0][0] * setup.grids[0][1]


def vit_groups(settings: Settings, spec: Spec) -> tuple[tuple[int, ...], ...]:
    """The blocks of the encoder whose means are the features."""
    return tuple((block,) for group in spec.groups for block in group) if settings.groups == "layers" else spec.groups


def prepared(setup: Setup, features: jax.Array) -> jax.Array:
    """Cached features float16 (B, G, T, D) → what is reconstructed: groups=one: their mean, float32 (B, 1, T, D);
    class_token=subtract or drop: patches only, (B, G, P, D), by subtract float32; else unchanged."""
    settings = setup.settings
    if settings.groups == "one":
        features = features.astype(jnp.float32).mean(axis=1, keepdims=True)
    if settings.class_token != "keep":
        patches = features[:, :, -patches_of(setup) :]
        subtract = settings.class_token == "subtract"
        features = patches.astype(jnp.float32) - features[:, :, :1] if subtract else patches
    return features


def recipe_of(setup: Setup) -> Recipe:
    """The recipe, with the settings that replace its own."""
    names = ("easy_fraction", "easy_factor")
    own = {name: getattr(setup.settings, name) for name in names if getattr(setup.settings, name) is not None}
    return dataclasses.replace(RECIPES[setup.settings.recipe], **own)


def init(setup: Setup, key: jax.Array) -> dict:
    model = network(setup)
    groups, tokens = len(setup.grids), 1 + setup.spec.registers + patches_of(setup)
    return model.init(key, prepared(setup, jnp.zeros((1, groups, tokens, setup.spec.width), jnp.float16)))


def loss(setup: Setup, variables: dict, features: jax.Array, key: jax.Array, step: jax.Array) -> tuple:
    recipe, model, features = recipe_of(setup), network(setup), prepared(setup, features)
    noisy = features
    if setup.settings.noise == "jitter":  # the bottleneck gets the mean over the groups: one draw for all of them
        mean = features.astype(jnp.float32).mean(axis=1, keepdims=True)  # (B, 1, T, D)
        length = jnp.linalg.norm(mean, axis=-1, keepdims=True) / mean.shape[-1]
        noisy = features + JITTER * length * jax.random.normal(key, mean.shape)
    decoded = model.apply(variables, noisy, train=True, rngs={"dropout": key})
    # on the host, in double precision; after the ramp the number stays
    hard = [hard_positions(recipe, s, len(features) * model.patches) for s in range(recipe.ramp_steps + 1)]
    hard = jnp.array(hard, jnp.int32)[jnp.minimum(step, recipe.ramp_steps)]
    mean, distance = reconstruction_loss(decoded, patch_targets(features, model.patches), hard, recipe.easy_factor)
    return mean, (highest_part(distance.mean(axis=1)), {})


def optimizer(setup: Setup, steps_per_pass: jax.Array | int) -> optax.GradientTransformation:
    return make_optimizer(RECIPES[setup.settings.recipe], setup.learning_rate, setup.steps, steps_per_pass)


def distance(setup: Setup, variables: dict, features: jax.Array) -> jax.Array:
    model, features = network(setup), prepared(setup, features)
    distances = cosine_distance(model.apply(variables, features), patch_targets(features, model.patches))  # (B, G, P)
    return distances.mean(axis=1).reshape(len(features), *setup.grids[0][:2])


def step_bytes(setup: Setup) -> int:
    """The memory that a step of one sub-model needs, about."""
    depth, tokens = sum(map(len, setup.spec.groups)), 1 + setup.spec.registers + patches_of(setup)
    return setup.batch_size * depth * STEP_ARRAYS * tokens * setup.spec.width * 4
