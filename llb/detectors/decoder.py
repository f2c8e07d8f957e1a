"""Dinomaly's network: the noisy bottleneck and the decoder (llb.detectors.dinomaly tells how they are used).

Source: Guo et al., "Dinomaly" (CVPR 2025, arXiv 2405.14325), section 3.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

# The released linear attention divides by q · Σk, and users report NaN. This term in the denominator prevents it.
ATTENTION_EPS = 1e-6


# Checkpointed: the backward pass computes these again from their input. Keeping their intermediate values would cost a
# quarter of a step's memory, and time on a machine whose memory is slower than its arithmetic.
@jax.checkpoint
def gelu(x: jax.Array) -> jax.Array:
    """x · Φ(x), exactly."""
    return nn.gelu(x, approximate=False)


@jax.checkpoint
def feature_map(x: jax.Array) -> jax.Array:
    """Linear attention's φ = elu + 1 in place of the softmax: (…) → float32 (…), each number by itself."""
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


class Attention(nn.Module):
    """Multi-head attention, (B, T, D) → (B, T, D). "linear": the feature map φ = elu + 1 in place of the softmax
    (Dinomaly, eq. 2).

    φ(q) (φ(k)ᵀ v) / (φ(q) · Σ φ(k)): the (T, T) attention matrix is never formed.
    """

    kind: str  # "linear" or "softmax"
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
        # (B, T, heads, D/heads) each
        q, k, v = (y.reshape(batch, tokens, self.heads, -1) for y in jnp.split(qkv, 3, axis=-1))
        if self.kind == "softmax":
            x = jax.nn.dot_product_attention(q, k, v)
        else:
            q, k = feature_map(q), feature_map(k)
            values = product("bthd,bthe->bhde", k, v)
            normaliser = jnp.einsum("bthd,bhd->bth", q, k.sum(axis=1)) + ATTENTION_EPS
            x = product("bthd,bhde->bthe", q, values) / normaliser[..., None]
        return Linear(width, self.linear_init, self.precision, name="proj")(x.reshape(batch, tokens, width))


class Mlp(nn.Module):
    """(B, T, D) → (B, T, 4 D) → (B, T, D) with exact GELU; with dropout before, between and after the layers it is the
    noisy bottleneck."""

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
    """A pre-norm transformer block, (B, T, D) → (B, T, D). Norms have ε = 1e-8, as the release."""

    attention: str
    heads: int
    linear_init: str
    precision: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm1, norm2 = (nn.LayerNorm(1e-8, use_fast_variance=False, name=name) for name in ("norm1", "norm2"))
        x = x + Attention(self.attention, self.heads, self.linear_init, self.precision, name="attn")(norm1(x))
        return x + Mlp(self.linear_init, self.precision, name="mlp")(norm2(x))


class Dinomaly(nn.Module):
    """Bottleneck and decoder.

    Args:
        depth: decoder blocks, as many as encoder blocks are reconstructed (8); a multiple of G.
        heads: attention heads, the encoder's.
        patches: P, the number of patch tokens; they are the last P of the T tokens.
        dropout: rate in the bottleneck while training.
        linear_init: "pytorch" or "truncated", see `Linear`.
        attention: "linear" or "softmax".
        precision: "float32" or "bfloat16". Matrix products round their operands to it; sums, the residual stream,
            norms, the attention's normaliser and parameters are float32.
    """

    depth: int
    heads: int
    patches: int
    dropout: float
    linear_init: str
    precision: str = "float32"
    attention: str = "linear"

    @nn.compact
    def __call__(self, features: jax.Array, train: bool = False) -> jax.Array:
        """features: float (B, G, T, D) → decoded: float32 (B, G, P, D). `train` needs the rng "dropout"."""
        x = features.astype(jnp.float32).mean(axis=1)  # (B, T, D)
        x = Mlp(self.linear_init, self.precision, self.dropout, name="bottleneck")(x, train).astype(jnp.float32)
        outputs = []
        for index in range(self.depth):
            x = Block(self.attention, self.heads, self.linear_init, self.precision, name=f"block_{index}")(x)
            outputs.append(x[:, -self.patches :])  # (B, P, D)
        # In reverse: the decoder's last blocks rebuild the encoder's first group.
        size = self.depth // features.shape[1]
        groups = [sum(outputs[end - size : end]) / size for end in range(self.depth, 0, -size)]
        return jnp.stack(groups, axis=1)
