"""Dinomaly: ONE anomaly detector that reconstructs the features of a frozen encoder. llb.train stacks K of them.

Source: Guo et al., "Dinomaly: The Less Is More Philosophy in Multi-Class Unsupervised Anomaly Detection" (CVPR 2025,
arXiv 2405.14325), section 3. The idea: a decoder that is trained on normal images reconstructs normal features well and
defects badly. So the cosine distance between a feature and its reconstruction tells how anomalous the position is.

    features (B, 2, T, D)   means of two groups of encoder blocks (llb.features); T = class + registers + P patch tokens
    input    (B, T, D)      their mean, which is the mean over all the blocks, since both groups are equally large
    noisy    (B, T, D)      bottleneck: an MLP with dropout, which prevents the decoder from copying its input
    blocks   L × (B, T, D)  decoder: transformer blocks with linear attention, which cannot focus on single positions
    decoded  (B, 2, P, D)   "loose" reconstruction: only means of two groups of blocks are compared; patch tokens
    distance (B, 2, P)      1 − cosine similarity at every position
    map      (B, S, S)      A · distance · Aᵀ: upsampled and blurred
    score    (B,)           mean of the map's highest 1 %
"""

from functools import lru_cache

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from scipy.ndimage import gaussian_filter1d

# The released linear attention divides by q · Σk, and users report NaN. This term in the denominator prevents it.
ATTENTION_EPS = 1e-6
COSINE_EPS = 1e-8  # torch.nn.CosineSimilarity's
TOP_FRACTION = 0.01  # share of a map's pixels whose mean is the image score
BLUR_SIGMA = 4.0  # pixels, at the map's full size


# Checkpointed: the backward pass computes these again from their input. Keeping their intermediate values would cost a
# quarter of a step's memory, and time on a machine whose memory is slower than its arithmetic.
@jax.checkpoint
def gelu(x: jax.Array) -> jax.Array:
    """x · Φ(x), exactly."""
    return nn.gelu(x, approximate=False)


@jax.checkpoint
def feature_map(x: jax.Array) -> jax.Array:
    """Linear attention's φ = elu + 1 in place of the softmax, float32."""
    return nn.elu(x.astype(jnp.float32)) + 1.0


class Linear(nn.Module):
    """A dense layer, D_in → `features`, initialised as one of the two recipes does.

    "pytorch": weights and biases uniform in ±1/√D_in (torch.nn.Linear's default, kept by LLBNAD).
    "truncated": weights normal with σ = 0.01 cut at ±0.03, biases zero (Dinomaly).
    """

    features: int
    linear_init: str
    precision: str  # operands and result of the product are rounded to this

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.linear_init == "pytorch":
            bound = x.shape[-1] ** -0.5

            def uniform(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
                return jax.random.uniform(key, shape, dtype, -bound, bound)

            init = {"kernel_init": uniform, "bias_init": uniform}
        else:
            init = {"kernel_init": nn.initializers.truncated_normal(0.01, lower=-3.0, upper=3.0)}
        return nn.Dense(self.features, dtype=self.precision, name="dense", **init)(x)


class LinearAttention(nn.Module):
    """Multi-head attention with the feature map φ = elu + 1 in place of the softmax (Dinomaly, eq. 2).

    φ(q) (φ(k)ᵀ v) / (φ(q) · Σ φ(k)): the (T, T) attention matrix is never formed.
    """

    heads: int
    linear_init: str
    precision: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, tokens, width = x.shape

        def product(formula: str, a: jax.Array, b: jax.Array) -> jax.Array:
            a, b = a.astype(self.precision), b.astype(self.precision)
            return jnp.einsum(formula, a, b).astype(jnp.float32)

        qkv = Linear(3 * width, self.linear_init, self.precision, name="qkv")(x)  # (B, T, 3 D)
        q, k, v = (y.reshape(batch, tokens, self.heads, -1) for y in jnp.split(qkv, 3, axis=-1))  # (B, T, H, D/H)
        q, k = feature_map(q), feature_map(k)
        values = product("bthd,bthe->bhde", k, v)
        normaliser = jnp.einsum("bthd,bhd->bth", q, k.sum(axis=1)) + ATTENTION_EPS
        x = product("bthd,bhde->bthe", q, values) / normaliser[..., None]
        return Linear(width, self.linear_init, self.precision, name="proj")(x.reshape(batch, tokens, width))


class Mlp(nn.Module):
    """D → 4 D → D with exact GELU; with dropout before, between and after the layers it is the noisy bottleneck."""

    linear_init: str
    precision: str
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        width = x.shape[-1]
        drop = nn.Dropout(self.dropout, deterministic=not train)
        x = Linear(4 * width, self.linear_init, self.precision, name="fc1")(drop(x))
        x = drop(gelu(x))
        return drop(Linear(width, self.linear_init, self.precision, name="fc2")(x))


class Block(nn.Module):
    """A pre-norm transformer block with linear attention."""

    heads: int
    linear_init: str
    precision: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm1, norm2 = (nn.LayerNorm(1e-8, use_fast_variance=False, name=name) for name in ("norm1", "norm2"))
        x = x + LinearAttention(self.heads, self.linear_init, self.precision, name="attn")(norm1(x))
        return x + Mlp(self.linear_init, self.precision, name="mlp")(norm2(x))


class Dinomaly(nn.Module):
    """Bottleneck and decoder.

    Args:
        depth: decoder blocks, as many as encoder blocks are reconstructed (8); even.
        heads: attention heads, the encoder's.
        patches: P, the number of patch tokens; they are the last P of the T tokens.
        dropout: rate in the bottleneck while training.
        linear_init: "pytorch" or "truncated", see `Linear`.
        precision: "float32" or "bfloat16". Matrix products round their operands to it; sums, the residual stream,
            norms, the attention's normaliser and parameters are float32.
    """

    depth: int
    heads: int
    patches: int
    dropout: float
    linear_init: str
    precision: str = "float32"

    @nn.compact
    def __call__(self, features: jax.Array, train: bool = False) -> jax.Array:
        """features: float (B, 2, T, D) → decoded: float32 (B, 2, P, D). `train` needs the rng "dropout"."""
        x = features.astype(jnp.float32).mean(axis=1)  # (B, T, D)
        x = Mlp(self.linear_init, self.precision, self.dropout, name="bottleneck")(x, train).astype(jnp.float32)
        outputs = []
        for index in range(self.depth):
            x = Block(self.heads, self.linear_init, self.precision, name=f"block_{index}")(x)
            outputs.append(x[:, -self.patches :])  # (B, P, D)
        # In reverse: the decoder's last blocks rebuild the encoder's first group.
        half = self.depth // 2
        groups = [sum(outputs[half:]) / half, sum(outputs[:half]) / half]
        return jnp.stack(groups, axis=1)


def patch_targets(features: jax.Array, patches: int) -> jax.Array:
    """The reconstruction's target: (B, 2, T, D) → float32 (B, 2, P, D), class and register tokens dropped."""
    return features[:, :, -patches:].astype(jnp.float32)


def cosine_distance(a: jax.Array, b: jax.Array) -> jax.Array:
    """1 − cosine similarity over the last axis: (…, D), (…, D) → (…), in 0..2."""
    dot = (a * b).sum(axis=-1)
    # max inside the root: the gradient of a norm at zero is not a number
    norms = jnp.sqrt(jnp.maximum((a * a).sum(axis=-1) * (b * b).sum(axis=-1), COSINE_EPS**2))
    return 1.0 - dot / norms


@jax.custom_vjp
def scale_gradient(x: jax.Array, factor: jax.Array) -> jax.Array:
    """The identity, whose gradient with respect to x is multiplied by `factor` (broadcast over x)."""
    return x


scale_gradient.defvjp(
    lambda x, factor: (x, factor),
    lambda factor, gradient: (gradient * factor, jnp.zeros_like(factor)),
)


def reconstruction_loss(decoded: jax.Array, target: jax.Array, hard: jax.Array, factor: float) -> jax.Array:
    """Global cosine loss with hard mining (Dinomaly, eq. 3–4).

    In each group, all P · D feature values of an image form one vector, and the loss is 1 − cosine between the decoded
    and the encoder's vector. At positions that are already
    reconstructed well the gradient is multiplied by `factor`: more training there would teach the decoder to
    reconstruct defects as well.

    Args:
        decoded, target: float32 (B, 2, P, D).
        hard: int scalar ≥ 1; in each group, of the B · P positions of the batch, the `hard` ones with the largest
            distance keep their gradient, and so do positions tied with the last of them.
        factor: multiplies the gradient at the other positions.

    Returns:
        scalar: the mean over groups and images of 1 − cosine similarity.
    """
    batch, groups, patches, width = decoded.shape
    distance = cosine_distance(jax.lax.stop_gradient(decoded), target)  # (B, 2, P)
    ranked = jnp.sort(distance.transpose(1, 0, 2).reshape(groups, batch * patches), axis=-1, descending=True)
    threshold = jax.lax.dynamic_index_in_dim(ranked, hard - 1, axis=-1, keepdims=False)  # (2,)
    weight = jnp.where(distance < threshold[:, None], factor, 1.0)
    decoded = scale_gradient(decoded, weight[..., None])
    flat = (batch, groups, patches * width)
    return cosine_distance(decoded.reshape(flat), target.reshape(flat)).mean()


@lru_cache
def map_matrix(size: int, grid: int, sigma: float = BLUR_SIGMA) -> np.ndarray:
    """A, float32 (size, grid): upsampling with aligned corners, then a Gaussian of `sigma` pixels.

    Both are linear and act on rows and columns alike, so the full-size map of D (grid × grid) is A · D · Aᵀ.
    The Gaussian is scipy.ndimage.gaussian_filter's (radius 4 σ, mirrored borders).
    """
    position = np.linspace(0.0, grid - 1.0, size)
    upsample = np.stack([np.interp(position, np.arange(grid), row) for row in np.eye(grid)], axis=1)  # (size, grid)
    return gaussian_filter1d(upsample, sigma, axis=0).astype(np.float32)


def anomaly_map(distance: jax.Array, size: int) -> jax.Array:
    """float32 (B, 2, P) distances → (B, size, size): mean over the two groups, upsampled and blurred."""
    batch, _, patches = distance.shape
    grid = int(patches**0.5)
    matrix = jnp.asarray(map_matrix(size, grid))
    distance = distance.mean(axis=1).reshape(batch, grid, grid)
    return jnp.einsum("sg,bgh,th->bst", matrix, distance, matrix)


def image_score(maps: jax.Array) -> jax.Array:
    """float32 (B, S, S) → (B,): the mean of the highest 1 % of each map's pixels (at least one)."""
    pixels = maps.reshape(maps.shape[0], -1)
    count = max(1, int(pixels.shape[1] * TOP_FRACTION))
    return jax.lax.top_k(pixels, count)[0].mean(axis=-1)
