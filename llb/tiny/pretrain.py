"""Pre-train `tiny`, this project's own encoder, on images that llb/tiny/textures.py draws. No photograph is involved.

    python -m llb.tiny.pretrain --export tiny.safetensors      about 9 minutes on two cores

A small ViT gets the filter-bank energies (llb/encoders/stem.py) of some patches and learns to predict properties of the
hidden patches. So it has to learn how structure continues from patch to patch. --objective chooses the loss
(llb/tiny/objectives.py), --mix the kinds of drawings. The energies of an image never change, so they are computed once,
when the image is drawn, and training works on the energies.

    energies   float16 (N, P, 53)   on disk
    batch      float16 (B, P, 53)   every image once per pass, in random order
    state      the parameters, AdamW's moments; for `teacher` also the moving average of the parameters

The same command continues an interrupted run.
"""

import math
import multiprocessing
import os
import signal
import time
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llb.checkpoint import check_params, open_checkpoints, restore_params, restore_state, save
from llb.config import LARGEST_SEED
from llb.console import progress, run_script, say
from llb.device import start_jax
from llb.encoders import stem
from llb.encoders.stem import ENERGIES
from llb.encoders.vit import ViT
from llb.encoders.weights import write_tree
from llb.features import normalise
from llb.files import check_writable_file, read_json, write_json
from llb.flags import flag, influential, parse_flags, real, whole
from llb.run import make_run_folder, refuse_differences
from llb.tiny import textures
from llb.tiny.objectives import GRID, OBJECTIVES, PATCHES, SPEC, init_params
from llb.tiny.textures import MIXES

DRAW_BATCH = 64  # images per call of the filter bank
SAMPLE = 2000  # images from which the energies' mean and standard deviation are computed
WHITEN = 512  # images from which the features' mean and covariance are computed
SHRINK = 1e-4  # of the largest variance, added to all; tried from 1e-2 to 1e-5: smaller is better, down to about 1e-4
TEACHER_MOMENTUM = 0.99  # per step; lower than in data2vec, because runs are short
CPU_PART = 4  # images; a CPU step works on parts of the batch whose activations fit the cache (a third faster)
SAVE_SECONDS = 60.0


@dataclass
class Pretrain:
    """Pre-train `tiny` on drawn images."""

    out: str = flag("runs/pretrain", "folder for the drawn energies and the checkpoints", affects=False)
    export: str | None = flag(None, "write the encoder's weights to this file at the end", affects=False, shown="none")
    objective: str = flag("energies", "the loss, see llb/tiny/objectives.py", choices=tuple(OBJECTIVES))
    mix: str = flag("six", "which kinds of images are drawn", choices=tuple(MIXES))
    images: int = flag(6000, "number of drawn images", whole(1))
    steps: int = flag(600, "optimiser steps; 0 keeps the random weights, for a comparison", whole(0))
    batch_size: int = flag(16, "images per step", whole(1))
    learning_rate: float = flag(1.5e-3, "peak learning rate of AdamW", real(0, 1, True))
    seed: int = flag(0, "determines all random numbers", whole(0, LARGEST_SEED))


def main() -> None:
    settings = parse_flags(Pretrain)
    say(start_jax())
    out = Path(settings.out)
    make_run_folder(out, out)  # it has no cache inside
    if settings.export:
        check_writable_file(settings.export, "--export")
    config, advice = out / "config.json", "give another --out"
    if config.exists():
        refuse_differences(read_json(config, advice), influential(settings), f"--out {out}", advice)
    else:
        write_json(config, influential(settings))

    energies = draw_energies(settings, out / "energies.npy")
    params = pretrain(settings, energies, out / "checkpoints")
    params["whitening"] = feature_whitening(params, energies[:WHITEN])
    if settings.export:
        about = {name: str(value) for name, value in influential(settings).items()}
        write_tree(params, settings.export, about)
        say(f"written: {settings.export}, {os.path.getsize(settings.export) / 1e6:.1f} MB")


# ---- drawing ----


def draw_image(index: int, seed: int, mix: str) -> np.ndarray:
    """Image number `index` of a seed and a mix: uint8 (S, S, 3)."""
    return textures.draw(np.random.default_rng([seed, index]), SPEC.image_size, MIXES[mix])


def draw_energies(settings: Pretrain, file: Path) -> np.ndarray:
    """Draw all images and write their energies to `file`, unless it exists.

    Worker processes draw, about 70 images a second on two cores. An interrupted drawing continues after the last
    complete batch. Energies that are not computed yet are zero; those of a drawn image never are.

    Returns:
        float16 (N, P, E), memory-mapped.
    """
    shape = (settings.images, PATCHES, ENERGIES)
    to_energies = jax.jit(lambda images: stem.energies(normalise(images)))
    if not file.exists():
        unfinished = file.with_suffix(".partial")
        mode = "r+" if unfinished.exists() else "w+"
        array = np.lib.format.open_memmap(unfinished, mode=mode, dtype=np.float16, shape=shape)
        starts = range(0, settings.images, DRAW_BATCH)
        done = bisect_left(starts, True, key=lambda start: not array[start : start + DRAW_BATCH][-1, -1].any())
        with closing(draw_images(settings, done * DRAW_BATCH)) as images:
            for start in progress(starts[done:], desc="drawing", unit="batch", initial=done, total=len(starts)):
                batch = list(islice(images, DRAW_BATCH))
                padded = np.resize(batch, (DRAW_BATCH, *batch[0].shape))  # one shape, compiled once
                array[start : start + DRAW_BATCH] = to_energies(padded)[: len(batch)]
        array.flush()
        del array  # Windows does not rename a mapped file
        os.replace(unfinished, file)
    return np.load(file, mmap_mode="r")


def draw_images(settings: Pretrain, first: int) -> Iterator[np.ndarray]:
    """Draw the images from number `first` to the last in worker processes: uint8 (S, S, 3) each."""
    draw = partial(draw_image, seed=settings.seed, mix=settings.mix)
    # Only this process reacts to Ctrl-C: workers ignore it from their start, and leaving the pool ends them
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    # spawn: a forked process must not inherit JAX's threads
    with multiprocessing.get_context("spawn").Pool() as pool:
        signal.signal(signal.SIGINT, handler)
        yield from pool.imap(draw, range(first, settings.images), chunksize=8)


# ---- training ----


def make_optimizer(settings: Pretrain) -> optax.GradientTransformation:
    """AdamW with a cosine schedule. Biases and norms do not decay; the stem's statistics stay fixed."""
    rate = optax.warmup_cosine_decay_schedule(0.0, settings.learning_rate, settings.steps // 20, max(1, settings.steps))
    decays = partial(jax.tree.map, lambda leaf: leaf.ndim > 1)
    adamw = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.03, mask=decays))

    def label(path, _leaf) -> str:
        return "fixed" if path[-1].key in ("mean", "std") else "learned"

    return optax.multi_transform(
        {"learned": adamw, "fixed": optax.set_to_zero()}, lambda params: jax.tree_util.tree_map_with_path(label, params)
    )


def batch_indices(settings: Pretrain, step: int) -> np.ndarray:
    """The images of a step: int (B,). Each pass over all images has its own random order."""
    positions = np.arange(step * settings.batch_size, (step + 1) * settings.batch_size)
    passes, within = np.divmod(positions, settings.images)
    orders = {p: np.random.default_rng([settings.seed, p]).permutation(settings.images) for p in set(passes.tolist())}
    return np.array([orders[p][i] for p, i in zip(passes.tolist(), within)])


def make_train_step(settings: Pretrain, optimizer: optax.GradientTransformation, key: jax.Array):
    """Build the compiled step: (state, energies float16 (B, P, E), step) → (next state, loss). `state` is donated."""
    loss_function, has_teacher = OBJECTIVES[settings.objective], settings.objective == "teacher"
    part = math.gcd(settings.batch_size, CPU_PART) if jax.default_backend() == "cpu" else settings.batch_size

    @partial(jax.jit, donate_argnums=0)
    def train_step(state: dict, energies: jax.Array, step: jax.Array) -> tuple[dict, jax.Array]:
        keys = jax.random.split(jax.random.fold_in(key, step), len(energies) // part)
        parts = energies.reshape(-1, part, *energies.shape[1:])
        loss_and_gradient = partial(jax.value_and_grad(loss_function), state["params"], state["teacher"])
        losses, gradients = jax.lax.map(lambda inputs: loss_and_gradient(*inputs), (parts, keys))
        loss, gradients = jax.tree.map(lambda leaf: leaf.mean(axis=0), (losses, gradients))
        updates, opt = optimizer.update(gradients, state["opt"], state["params"])
        params, teacher = optax.apply_updates(state["params"], updates), state["teacher"]
        if has_teacher:
            teacher = optax.incremental_update(params, teacher, 1 - TEACHER_MOMENTUM)
        return {"params": params, "teacher": teacher, "opt": opt}, loss

    return train_step


def pretrain(settings: Pretrain, energies: np.ndarray, folder: Path) -> dict:
    """Train, and save a checkpoint about once a minute.

    Args:
        energies: float16 (N, P, E), of the drawn images.
        folder: for the checkpoints; training continues from the newest.

    Returns:
        the encoder's parameters.
    """
    init_key, step_key = jax.random.split(jax.random.key(settings.seed))
    optimizer = make_optimizer(settings)
    train_step = make_train_step(settings, optimizer, step_key)
    sample = energies[:SAMPLE].astype(np.float32).reshape(-1, ENERGIES)
    statistics = {"mean": sample.mean(axis=0), "std": sample.std(axis=0) + 1e-3}

    @jax.jit
    def start_state() -> dict:
        params = init_params(settings.objective, init_key)
        params["vit"]["stem"] |= statistics
        # a copy, because the first step gets both as donated buffers
        teacher = jax.tree.map(jnp.copy, params) if settings.objective == "teacher" else {}
        return {"params": params, "teacher": teacher, "opt": optimizer.init(params)}

    with open_checkpoints(folder, tidy=True) as checkpoints:
        start = checkpoints.latest_step()  # None before the first save
        if start == settings.steps:
            return restore_params(checkpoints)
        state = restore_state(checkpoints, jax.eval_shape(start_state)) if start else start_state()
        start = start or 0
        last_save = time.monotonic()
        with progress(total=settings.steps, initial=start, desc="pre-training", unit="step") as bar:
            for step in range(start, settings.steps):
                state, loss = train_step(state, energies[batch_indices(settings, step)], np.int32(step))
                bar.update()
                if step % 20 == 0:  # reading a loss waits for the device
                    bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
                if time.monotonic() - last_save > SAVE_SECONDS and step + 1 < settings.steps:
                    host_state = jax.device_get(state)
                    check_params(host_state["params"], step + 1)
                    save(checkpoints, step + 1, host_state, "")
                    last_save = time.monotonic()
        params = jax.device_get(state["params"])["vit"]
        check_params(params, settings.steps)
        save(checkpoints, settings.steps, {"params": params}, "")
    return params


# ---- whitening ----


def feature_whitening(params: dict, energies: np.ndarray) -> dict[str, np.ndarray]:
    """Statistics that whiten the patch tokens: (x − mean) @ matrix has about unit covariance.

    The matrix is symmetric (`zca`), so the two groups of blocks keep their common axes. Dinomaly's bottleneck gets the
    mean of the two groups.

    Args:
        params: the encoder's.
        energies: float16 (n, P, E).

    Returns:
        "mean" (2, D) and "matrix" (2, D, D), float32, one entry for each group of blocks.
    """

    @jax.jit
    def group_means(energies: jax.Array) -> jax.Array:
        tokens = ViT(SPEC).apply({"params": params}, energies.astype(jnp.float32), GRID)
        return jnp.stack([sum(tokens[block] for block in group) / len(group) for group in SPEC.groups])

    parts = [np.asarray(group_means(energies[i : i + 32]))[:, :, -PATCHES:] for i in range(0, len(energies), 32)]
    means, matrices = [], []
    for tokens in np.concatenate(parts, axis=1).reshape(len(SPEC.groups), -1, SPEC.width):
        mean, matrix = zca(tokens, SHRINK)
        means.append(mean)
        matrices.append(matrix)
    return {"mean": np.stack(means), "matrix": np.stack(matrices)}


def zca(samples: np.ndarray, shrink: float) -> tuple[np.ndarray, np.ndarray]:
    """Whitening by a symmetric matrix: (x − mean) @ matrix has unit covariance.

    Args:
        samples: float (n, D).
        shrink: this share of the largest variance is added to all; directions with much less variance stay small.

    Returns:
        mean (D,) and matrix (D, D), float32.
    """
    samples = samples.astype(np.float64)
    variance, axes = np.linalg.eigh(np.cov(samples.T))
    matrix = axes / np.sqrt(variance + shrink * variance[-1]) @ axes.T
    return samples.mean(axis=0).astype(np.float32), matrix.astype(np.float32)


if __name__ == "__main__":
    run_script(main)
