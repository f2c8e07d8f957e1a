"""DeSTSeg: a student that sees a damaged image imitates the teacher on the clean one; a head segments the difference.

Source: Zhang et al., "DeSTSeg: Segmentation Guided Denoising Student-Teacher for Anomaly Detection" (CVPR 2023,
arXiv 2211.11317), section 3. Teacher: the frozen encoder. Two phases in one loop: in the first fifth of the steps the
student learns to give, for a damaged image (llb.detectors.damage), the teacher's features of the clean one. Then it is
frozen, and the head learns to see where teacher and student differ on a damaged image; the painted masks are known.
Sizes for ResNet-18 at 256 pixels:

    images     (B, 256, 256, 3)                 in place of cached features, since each step damages them again
    teacher    64 × 64², 128 × 32², 256 × 16²   strides 4, 8, 16, each vector of length 1
    student    ResNet-18 with random weights down to 512 × 8²; a decoder of two blocks on each of 8², 16², 32², 64²,
               bilinear between; its last three outputs have the teacher's sizes
    loss       Σ over the three of 1 − cosine similarity
    products   448 × 64²                        −teacher · student, channel by channel
    res        256 × 64²                        two blocks
    head       256 × 64² → 64²                  ASPP (dilations 6, 12, 18 and the mean), 3 × 3, 1 × 1; sigmoid
    loss       focal + L1, against the masks
    score      (B,)                             mean of the map's 100 highest pixels

On another encoder's grids the student's outputs are resized; on a ViT, whose two maps lie on one grid, those of 256 and
128 channels. A 1 × 1 convolution gives other channels, and signed ones (a block's output never is negative).
Differs from the release: textures (see damage), normal images are not rotated, the student's loss is 32 · batch mean.
As there, the middle of a position's patch decides whether it counts as damaged: there 2 × 2 of 4 × 4 pixels.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from llb.detectors.common import MapRule, Setup, between, highest_part, resize, resize_matrix
from llb.detectors.damage import damage
from llb.detectors.layers import ConvNorm
from llb.encoders.specs import CnnSpec
from llb.files import UserError
from llb.images import IMAGENET_MEAN, IMAGENET_STD

IMAGES, STRIDES = True, (4, 8, 16)
PUBLISHED = {"resnet18": {"image_size": 256, "batch_size": 32}}
LEARNING_RATE, BATCH_SIZE, DEMO_STEPS, DEMO_BATCH_SIZE = 0.4, 8, (240, 600), 2  # (60, 200) of 8 learn too little
MAP, SCORE, AGGREGATE = MapRule(align_corners=False, sigma=0.0), "top-100", "mean"

RES_RATE, HEAD_RATE = 0.25, 0.025  # of the segmentation's two parts; times the student's 0.4
MOMENTUM, DECAY, UNIT_EPS, RELEASED_BATCH = 0.9, 1e-4, 1e-12, 32  # over a batch the release sums the student's loss
DILATIONS, FOCAL = (6, 12, 18), 4  # γ of the focal loss: pixels that are classified well count little


@dataclass(frozen=True)
class Settings:
    width: int = between(0, 0, 1024)  # channels of the student's first stage; 0: a quarter of the deepest map's, ≤ 64
    student_share: float = between(0.2, 0, 1)  # of the steps, in which the student is trained
    noise_share: float = between(0.5, 0, 1)  # of the textures that are drawn noise; else another image of the batch


class Blocks(nn.Module):
    """Two basic blocks of a ResNet, which gives a stage: (B, h, w, C) → (B, ⌈h / stride⌉, ⌈w / stride⌉, width)."""

    width: int
    stride: int = 1
    last_scale: float = 1.0  # γ of a block's last BatchNorm at the start
    precision: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = partial(ConvNorm, self.width, precision=self.precision)
        for block, stride in enumerate((self.stride, 1)):
            y = nn.relu(conv(stride=stride, name=f"conv_{block}_1")(x, train))
            y = conv(scale=self.last_scale, name=f"conv_{block}_2")(y, train)
            if x.shape != y.shape:
                x = conv(size=1, stride=stride, name=f"shortcut_{block}")(x, train)
            x = nn.relu(x + y)
        return x


class Student(nn.Module):
    """ResNet-18 and a decoder: images (B, S, S, 3), normalised → maps of the teacher's sizes, finest first."""

    width: int
    grids: tuple[tuple[int, int, int], ...]  # (h, w, C) of the teacher's maps
    signed: bool  # the teacher's features may be negative
    precision: str = "float32"

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> tuple[jax.Array, ...]:
        width, blocks = self.width, partial(Blocks, precision=self.precision)
        x = nn.relu(ConvNorm(width, 7, 2, precision=self.precision, name="stem")(images, train))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))  # pads with −∞
        for stage in range(4):  # a block begins as its shortcut alone, as timm's ResNets
            x = blocks(width * 2**stage, min(stage + 1, 2), last_scale=0.0, name=f"encoder_{stage}")(x, train)
        x, maps = blocks(8 * width, name="decoder_3")(x, train), []
        for level, (*grid, channels) in zip((2, 1, 0), reversed(self.grids)):
            y = x = blocks(width * 2**level, name=f"decoder_{level}")(resize(x, *grid), train)
            if self.signed or channels != x.shape[-1]:
                first = nn.initializers.constant(x.shape[-1] ** -0.5)
                y = nn.Dense(channels, kernel_init=first, name=f"output_{level}")(x)  # float32: it is compared
            maps.insert(0, y)
        return tuple(maps)


class Head(nn.Module):
    """Atrous spatial pyramid pooling, which sees several scales at once: (B, h, w, C) → logits (B, h, w)."""

    precision: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        width = x.shape[-1]
        conv = partial(ConvNorm, width, fan_in=True, precision=self.precision)
        mean = nn.relu(conv(size=1, name="mean")(x.mean(axis=(1, 2), keepdims=True), train))
        parts = [nn.relu(conv(dilation=d, name=f"dilated_{d}")(x, train)) for d in DILATIONS]
        parts.insert(0, jnp.broadcast_to(mean, x.shape))
        x = nn.relu(conv(name="project")(jnp.concatenate(parts, axis=-1), train))
        x = nn.relu(conv(name="last")(x, train))
        scale = nn.initializers.constant((3 * width) ** -0.5)
        return nn.Dense(1, kernel_init=scale, bias_init=scale, name="logit")(x)[..., 0]


# ---- the detector, as llb.detectors describes it ----


def networks(setup: Setup) -> dict[str, nn.Module]:
    """The three parts, whose variables lie under these names and have a learning rate each."""
    precision, width = setup.precision, setup.settings.width or min(64, setup.grids[-1][2] // 4)
    signed = not (isinstance(setup.spec, CnnSpec) and setup.spec.resnet)
    res, head = Blocks(4 * width, precision=precision), Head(precision)
    return {"student": Student(width, setup.grids, signed, precision), "res": res, "head": head}


def apply(setup: Setup, variables: dict, part: str, x: jax.Array, train: bool = False) -> tuple[Any, dict]:
    """What one part makes of x, and the batch statistics of all parts, which change in training."""
    own = {collection: parts[part] for collection, parts in variables.items()}
    y, changed = networks(setup)[part].apply(own, x, train, mutable=["batch_stats"])
    return y, {"batch_stats": variables["batch_stats"] | {part: changed["batch_stats"]}}


def init(setup: Setup, key: jax.Array) -> dict:
    side, grid, parts = setup.image_size, setup.grids[0][:2], networks(setup)
    inputs = (side, side, 3), (*grid, sum(channels for *_, channels in setup.grids)), (*grid, parts["res"].width)
    variables = {"params": {}, "batch_stats": {}}
    for own_key, shape, (part, network) in zip(jax.random.split(key, 3), inputs, parts.items()):
        own = network.init(own_key, jnp.zeros((1, *shape)), False)
        # Until here each kernel is filled with its standard deviation. One draw for all compiles faster than one each.
        leaves, tree = jax.tree_util.tree_flatten_with_path(own["params"])
        ends = np.cumsum([leaf.size for _, leaf in leaves])
        uniform = partial(jax.random.uniform, minval=-(3**0.5), maxval=3**0.5)
        numbers = jnp.split((uniform if part == "head" else jax.random.normal)(own_key, ends[-1:]), ends[:-1])
        variables["params"][part] = tree.unflatten(
            leaf if path[-1].key == "scale" else leaf * drawn.reshape(leaf.shape)  # biases are 0, but for the last one
            for (path, leaf), drawn in zip(leaves, numbers)
        )
        variables["batch_stats"][part] = own["batch_stats"]
    return variables


def normalise(images: jax.Array) -> jax.Array:
    """ImageNet's normalisation of images within 0 … 1."""
    return (images - IMAGENET_MEAN) / IMAGENET_STD


def unit(maps: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Vectors of length 1; the maximum keeps the gradient of a zero vector finite."""
    return tuple(x / (jnp.sqrt(jnp.maximum((x * x).sum(-1, keepdims=True), UNIT_EPS**2)) + UNIT_EPS) for x in maps)


def products(teacher: tuple[jax.Array, ...], student: tuple[jax.Array, ...]) -> jax.Array:
    """−teacher · student of each channel, on the finest grid: (B, h, w, ΣC). Sums over a map's channels: −cosine."""
    grid = teacher[0].shape[1:3]
    return jnp.concatenate([resize(-t * s, *grid) for t, s in zip(teacher, student)], axis=-1)


def student_loss(teacher: tuple[jax.Array, ...], student: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    """Σ over the maps of 1 − cosine similarity, mean over positions, times the release's batch; and (B,)."""
    levels = [1 - (t * s).sum(axis=-1) for t, s in zip(teacher, student)]
    return RELEASED_BATCH * sum(one.mean() for one in levels), sum(map(highest_part, levels))


def segmentation_loss(logits: jax.Array, mask: jax.Array) -> jax.Array:
    """Focal loss + L1: logits (B, h, w), mask 0 or 1, of the same shape → scalar."""
    error = jnp.abs(nn.sigmoid(logits) - mask)  # 1 − the probability of the true class
    surprise = -nn.log_sigmoid(jnp.where(mask > 0, logits, -logits))
    return (surprise * error**FOCAL).mean() + error.mean()


def small_mask(mask: jax.Array, height: int, width: int) -> jax.Array:
    """bool (B, S, S) → 0 or 1 (B, height, width): bilinear without antialiasing, 1 from ½ on."""
    rows, columns = (resize_matrix(n, m, False) for n, m in zip((height, width), mask.shape[1:]))
    small = jnp.einsum("rh,cw,bhw->brc", rows, columns, mask.astype(jnp.float32), precision="highest")
    return (small >= 0.5).astype(jnp.float32)


def student_steps(setup: Setup) -> int:
    return round(setup.settings.student_share * setup.steps)


def loss(setup: Setup, variables: dict, features: tuple, key: jax.Array, step: jax.Array) -> tuple:
    if setup.batch_size == 1:
        raise UserError("--batch-size 1: destseg's BatchNorm needs 2 images or more")
    images, encoder_params = features
    clean = images.astype(jnp.float32) / 255
    damaged, mask = damage(key, clean, setup.settings.noise_share)
    first = step < student_steps(setup)
    teacher = unit(setup.encode(encoder_params, normalise(jnp.where(first, clean, damaged))))
    seen = normalise(damaged)

    def of_student(variables: dict) -> tuple:
        maps, changed = apply(setup, variables, "student", seen, train=True)
        mean, each = student_loss(teacher, unit(maps))
        return mean, (each, changed)

    def of_segmentation(variables: dict) -> tuple:
        maps, _ = apply(setup, jax.lax.stop_gradient(variables), "student", seen)
        x, changed = apply(setup, variables, "res", products(teacher, unit(maps)), train=True)
        logits, changed = apply(setup, variables | changed, "head", x, train=True)
        nothing = jnp.full(len(images), jnp.nan)  # its errors are those on painted damage, not on the image's own
        return segmentation_loss(logits, small_mask(mask, *logits.shape[1:])), (nothing, changed)

    # `step` is one number for all sub-models, so under vmap this stays a branch
    return jax.lax.cond(first, of_student, of_segmentation, variables)


def optimizer(setup: Setup, steps_per_pass: jax.Array | int) -> optax.GradientTransformation:
    """Plain SGD with momentum, constant rates. Outside of its phase a part has neither decay nor momentum nor steps."""

    def sgd(share: float, of_student: bool) -> optax.GradientTransformation:
        def active(count: jax.Array) -> jax.Array:
            return ((count < student_steps(setup)) == of_student).astype(jnp.float32)

        return optax.chain(
            optax.add_decayed_weights(DECAY),
            optax.scale_by_schedule(active),
            optax.trace(MOMENTUM),
            optax.scale_by_schedule(lambda count: -share * setup.learning_rate * active(count)),
        )

    parts = {"student": sgd(1.0, True), "res": sgd(RES_RATE, False), "head": sgd(HEAD_RATE, False)}
    return optax.multi_transform(parts, {part: part for part in parts})


def distance(setup: Setup, variables: dict, features: tuple) -> jax.Array:
    """The probability of a defect at each position of the finest grid: (B, h, w) within 0 … 1."""
    images, encoder_params = features
    seen = normalise(images.astype(jnp.float32) / 255)
    teacher, student = setup.encode(encoder_params, seen), apply(setup, variables, "student", seen)[0]
    x, _ = apply(setup, variables, "res", products(unit(teacher), unit(student)))
    return nn.sigmoid(apply(setup, variables, "head", x)[0])
