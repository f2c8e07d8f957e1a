"""The demo set: drawn photographs of a machined flange, with planted defects. This file draws all of it.

    python -m llb.demo --out flanges                   the demo set, an MVTec-style root of about 10 MB
    python -m llb.demo --out rare --recurring 0        the same parts, whose defects do not recur
    python -m llb.ablate --preset noise --data rare --encoder tiny --detector padim     what contamination does to it

A turned steel flange lies on a woven mat: a bore with a keyway, six bolt holes, an engraved ring with a scale. Between
images it is shifted (±3 px) and turned (±4°), the light changes in strength, direction and tint, and every tool mark,
thread and grain of noise is different. There are six kinds of defect, from plain to faint. As in a factory each has
a cause (a worn drill, a dirty gripper), so it recurs at about the same place: a detector that sees it in train learns
it as normal. --recurring is the share of these; the others lie anywhere, no two alike. The seed determines every pixel,
on every machine.
"""

import inspect
import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import binary_closing, binary_fill_holes, gaussian_filter

from llb.console import run_script, say
from llb.files import UserError, check_writable, digest_of_files, typed, write_text
from llb.flags import flag, parse_flags, real, whole

SIDE = 128  # pixels
KINDS = ("chip", "dent", "fibre", "scratch", "shallow_hole", "stain")
NORMAL, FAULTY = 160, 36  # training images; defective ones of each kind: half of them make 40 % of the training set
COUNTS = {"train/good": NORMAL, "test/good": 50} | {f"test/{kind}": FAULTY for kind in KINDS}
RECURRING, STRENGTH = 1.0, 1.0  # share of the defects that recur; of a defect's contrast
VISIBLE = 12  # grey levels of 255: pixels that differ by more belong to the mask
MARKER = "drawn.txt"  # tells by what the set is drawn; its text is written last, without it the set is drawn again

RADIUS, BORE, BOLT_CIRCLE, BOLT, RING = 52.0, 11.5, 33.0, 4.6, 43.5  # the flange, in pixels
LAMP = np.array([-0.6, -0.8])  # where the light comes from: above, a little to the left (x, y)
STEEL = np.array([0.97, 0.99, 1.02])
MAT = np.array([0.15, 0.23, 0.27])

Draw = Callable[[list[int], str], tuple[np.ndarray, np.ndarray]]  # seed, kind → uint8 (S, S, 3), mask bool (S, S)


@dataclass
class Demo:
    """Draw the demo set, or one with other defects, as an image set for --data."""

    out: str = flag("flanges", "folder of the image set")
    recurring: float = flag(RECURRING, "share of the defects that recur at one place of their kind", real(0, 1))
    strength: float = flag(STRENGTH, "contrast of the defects: 1 is the demo set's", real(0, 4, open_below=True))
    seed: int = flag(0, "determines every pixel", whole(0))


def main() -> None:
    settings = parse_flags(Demo)
    out = Path(settings.out)
    if check_writable(out) and not (out / "part" / MARKER).exists():
        raise UserError(f"--out {out} holds other files: give a new or empty folder")
    write_demo(out, settings.seed, settings.recurring, settings.strength)
    say(f"{out}: {NORMAL} normal training images, {sum(COUNTS.values()) - NORMAL} test images")
    flags = "--noise-ratio 0.2 --encoder tiny --steps 100 --batch-size 8"  # as the demo set's
    say(f"next: python stage1_partition.py --data {typed(out)} {flags} --out runs/NAME")
    say("      python stage2_train.py --run runs/NAME --steps 200 --train-on all (or purified, or clean)")


def write_demo(folder: Path | str, seed: int = 0, recurring: float = RECURRING, strength: float = STRENGTH) -> None:
    """Draw the whole set into `folder`/part, in the layout of MVTec AD. A finished set stays as it is.

    160 normal training images; for test 50 normal ones, 36 with each kind of defect, and their masks: 128 × 128 px,
    PNG. It takes some seconds. After an interruption the next call starts again.

    recurring: share of the defects that recur at one place; strength: factor of their contrast.
    """

    def drawn(key: list[int], kind: str) -> tuple[np.ndarray, np.ndarray]:
        number = key[-1]
        recurs = int((number + 1) * recurring) > int(number * recurring)  # evenly among the images of a kind
        return draw(key, kind, recurs, strength)

    note = "" if (recurring, strength) == (RECURRING, STRENGTH) else f", recurring {recurring}, strength {strength}"
    write_set(Path(folder) / "part", COUNTS, drawn, seed, note)


def demo_in(cache: Path) -> Path:
    """The demo set in the folder of all runs, drawn if it is not there yet. It appears whole, so several commands may
    call this at once; other code has another folder."""
    folder = cache / "demo" / digest_of_files([Path(__file__)], Path(__file__).parent)[:16]
    if not folder.exists():
        check_writable(cache, "--cache")
        unfinished = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
        write_demo(unfinished)
        with suppress(OSError):  # another command was faster
            unfinished.rename(folder)
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def write_set(folder: Path, counts: dict[str, int], draw: Draw, seed: int, note: str = "") -> None:
    """Draw one category of an MVTec-style root into `folder`. A finished one stays as it is, any other is replaced.

    counts: images of each "train/good", "test/<kind>"; note: what `draw` depends on besides its code.
    """
    marker, source = folder / MARKER, Path(inspect.getfile(draw))
    digest = digest_of_files([source], source.parent)  # changed code draws again
    text = f"drawn by {source.name} ({digest[:12]}), seed {seed}, {sum(counts.values())} images{note}\n"
    if marker.exists() and marker.read_text(encoding="utf-8") == text:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_text(marker, "not finished\n")
    for group, (place, count) in enumerate(counts.items()):
        kind = place.split("/")[1]
        masks = folder / "ground_truth" / kind
        (folder / place).mkdir(parents=True)
        for index in range(count):
            image, mask = draw([seed, group, index], kind)
            Image.fromarray(image).save(folder / place / f"{index:03}.png")
            if kind != "good":
                masks.mkdir(parents=True, exist_ok=True)
                Image.fromarray(mask.astype(np.uint8) * 255).save(masks / f"{index:03}_mask.png")
    write_text(marker, text)


def draw(
    seed: int | list[int], kind: str = "good", recurring: bool = True, strength: float = STRENGTH
) -> tuple[np.ndarray, np.ndarray]:
    """One photograph: image uint8 (128, 128, 3) and the defect's mask bool (128, 128), empty for "good".

    The mask is where the image visibly differs from the same photograph without the defect. recurring: whether the
    defect lies at its kind's place, or anywhere; strength: factor of its contrast.
    """
    normal = _photograph(seed, "good")
    image = normal if kind == "good" else normal + strength * (_photograph(seed, kind, recurring) - normal)
    image, normal = ((2 * np.rint(127 * values.clip(0, 1))).astype(np.uint8) for values in (image, normal))
    change = np.abs(image.astype(int) - normal).max(axis=2)  # (S, S); 7 bits: files a quarter smaller
    return image, binary_fill_holes(binary_closing(change > VISIBLE))


def _photograph(seed: int | list[int], kind: str, recurring: bool = True) -> np.ndarray:
    """The light of every pixel, float64 (S, S, 3), 1 is white. The defect has its own random stream, so all else equals
    the normal image."""
    random, fault = np.random.default_rng(seed).spawn(2)
    place = _place(fault, kind, recurring)

    # ---- the pose: u, v and r, angle belong to the flange, x, y and bearing to the image ----
    y, x = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2  # (S, S)
    shift_x, shift_y = random.uniform(-3, 3, 2)
    turn = np.deg2rad(random.uniform(-4, 4))
    x, y = x - shift_x, y - shift_y
    u, v = np.cos(turn) * x + np.sin(turn) * y, np.cos(turn) * y - np.sin(turn) * x
    r, angle, bearing = np.hypot(u, v), np.arctan2(v, u), np.arctan2(y, x)

    # ---- the outlines: rim, bore with keyway, bolt holes ----
    rim = r - RADIUS
    bore = np.minimum(r - BORE, np.maximum(np.abs(u) - 2.6, np.abs(v + BORE) - 4.0))
    holes = [_distance(u, v, BOLT_CIRCLE, corner) - BOLT for corner in np.arange(6) * np.pi / 3 + np.pi / 6]
    bolts = np.min(holes, axis=0)
    if kind == "chip":
        bite = _distance(u, v, RADIUS + 1.5, place[1]) - fault.uniform(4.5, 7.0) + 1.1 * _blotches(fault, 2.0)
        rim = np.maximum(rim, -bite)
    solid = np.maximum(rim, -np.minimum(bore, bolts))
    metal = _cover(solid)
    if kind == "shallow_hole":
        floor = _cover(holes[fault.choice((0, 5) if recurring else 6)])  # the worn drills make two of them
        metal = np.maximum(metal, fault.uniform(0.6, 0.8) * floor)

    # ---- the mat: a plain weave, threads of uneven brightness; the flange throws a soft shadow ----
    phase_x, phase_y = random.uniform(0, 6, 2)
    across, along = np.sin(np.pi * (x + phase_x) / 3), np.sin(np.pi * (y + phase_y) / 3)
    weave = np.where(across * along > 0, np.abs(across), np.abs(along))
    shade = 1 - 0.55 * gaussian_filter(np.roll(_cover(r - RADIUS), (4, 3), (0, 1)), 3.0)
    mat = (0.62 + 0.55 * weave + 0.10 * _blotches(random, 5.0)) * shade
    mat = np.where((bore < 1) | (bolts < 1), 0.62 * mat, mat)[..., None] * MAT  # (S, S, 3)

    # ---- the steel: turning marks that depend on the radius, and the fan of light that they reflect ----
    marks = np.interp(r, np.arange(256) / 4, gaussian_filter(random.normal(size=256), 1.2) * 2.0)
    fan = np.abs(np.cos(bearing - random.normal(np.deg2rad(-40), np.deg2rad(5)))) ** 5
    steel = 0.48 + 0.030 * marks + 0.30 * fan * (1 + 0.25 * marks) + 0.016 * _blotches(random, 0.8)
    steel = steel - 0.07 * _cover(r - 21.5)  # the hub is turned a little deeper
    radial = (x * LAMP[0] + y * LAMP[1]) / np.maximum(r, 1)  # 1 where an outward edge faces the lamp
    for outline, strength in ((rim + 1.6, 0.22), (-(r - BORE - 1.6), -0.20), (-(r - 21.5), -0.10)):
        steel = steel + strength * radial * _band(outline, 1.3)
    steel = steel - 0.20 * _band(r - RING, 0.9) + 0.10 * _band(r - RING - 1.6, 0.7)  # the engraved ring
    ticks = np.abs((angle / (np.pi / 12) + 0.5) % 1 - 0.5) * (np.pi / 12) * r
    steel = steel - 0.16 * _band(ticks, 0.6) * _band(r - 46.8, 1.6)
    slope = np.gradient(bolts)
    steel = steel - 0.20 * (slope[1] * LAMP[0] + slope[0] * LAMP[1]) * _band(bolts - 1.0, 1.1)
    steel = steel[..., None] * STEEL

    # ---- defects of the surface ----
    if kind == "chip":
        steel = steel + 0.35 * _band(bite - 0.3, 0.6)[..., None]  # fresh fracture is bright
    if kind == "dent":
        wide, depth = fault.uniform(2.2, 3.2), fault.uniform(0.7, 1.0)
        from_x, from_y = x - place[0] * np.cos(place[1] + turn), y - place[0] * np.sin(place[1] + turn)
        bowl = np.exp(-(from_x**2 + from_y**2) / (2 * wide**2))
        steel = steel - (bowl * (depth * (from_x * LAMP[0] + from_y * LAMP[1]) / wide + 0.1))[..., None]
    if kind == "scratch":
        far = _line(fault, u, v, place, fault.uniform(14, 28), bend=0.02)
        strength = fault.uniform(0.36, 0.56)
        steel = steel + strength * (_band(far, 0.8) - 0.5 * _band(far - 1.6, 0.6))[..., None]
    if kind == "stain":
        edge = _distance(u, v, *place) - fault.uniform(6, 9) + 2.2 * _blotches(fault, 3.0)
        film = _cover(edge / 2) * (0.75 + 0.25 * _band(edge + 1.5, 1.5))
        steel = steel * (1 - fault.uniform(0.9, 1.3) * film[..., None] * np.array([0.10, 0.15, 0.24]))

    # ---- the photograph: what lies on top, uneven light, grain ----
    image = mat + (steel - mat) * metal[..., None]
    if kind == "fibre":
        far = _line(fault, u, v, place, fault.uniform(24, 40), bend=0.16)
        image = image * (1 - 0.25 * _cover(gaussian_filter(np.roll(far, (1, 1), (0, 1)), 1.0) - 1.2)[..., None])
        image = image + (np.array([0.42, 0.12, 0.13]) - image) * 0.85 * _cover(far - 0.55)[..., None]
    tilt_x, tilt_y = random.normal(0, 0.06, 2)
    light = random.uniform(0.90, 1.08) * (1 + (tilt_x * x + tilt_y * y) / SIDE)
    image = image * light[..., None] * (1 + random.normal(0, 0.02) * np.array([1, 0, -1]))  # warm or cold
    return image + random.normal(0, 0.006, (SIDE, SIDE, 1)) + random.normal(0, 0.002, (SIDE, SIDE, 3))


def _cover(distance: np.ndarray) -> np.ndarray:
    """Share of each pixel inside the outline, from the signed distance (px) of its centre: 0…1."""
    return np.clip(0.5 - distance, 0, 1)


def _band(distance: np.ndarray, half: float) -> np.ndarray:
    """A soft stripe along an outline: 1 on it, 0 at twice `half` pixels from it."""
    return np.clip(1 - np.abs(distance) / (2 * half), 0, 1)


def _distance(u: np.ndarray, v: np.ndarray, radius: float, angle: float) -> np.ndarray:
    """Distance (px) from the point (radius, angle) of the flange."""
    return np.hypot(u - radius * np.cos(angle), v - radius * np.sin(angle))


def _blotches(random: np.random.Generator, sigma: float) -> np.ndarray:
    """Smooth noise (S, S) of unit variance, features of about `sigma` pixels."""
    noise = gaussian_filter(random.normal(size=(SIDE, SIDE)), sigma, mode="wrap")
    return noise / noise.std()


def _place(random: np.random.Generator, kind: str, recurring: bool) -> tuple[float, float]:
    """Radius (px) and angle on the flange: of a recurring defect its kind's own, give or take some pixels."""
    places = {"chip": (0, 200), "dent": (29, 120), "fibre": (30, 160), "scratch": (31, -60), "stain": (32, 30)}
    radius, degrees = places.get(kind, (0, 0))  # a chip only needs the angle, other kinds neither
    if recurring:
        return radius + random.normal(0, 1), np.deg2rad(degrees + random.normal(0, 3))
    return random.uniform(17, 27 if kind == "dent" else 46), random.uniform(0, 2 * np.pi)


def _line(random, u: np.ndarray, v: np.ndarray, place: tuple[float, float], length: float, bend: float) -> np.ndarray:
    """Distance (px) from a line through `place`, about tangential; its heading wanders, more with a larger `bend`."""
    turns = gaussian_filter(random.normal(size=int(length / 0.7)), 4.0) * 3.0 * bend  # one for each 0.7 px
    heading = place[1] + np.pi / 2 + random.normal(0, 0.35) + np.cumsum(turns)
    path_u, path_v = np.cumsum(0.7 * np.cos(heading)), np.cumsum(0.7 * np.sin(heading))
    path_u += place[0] * np.cos(place[1]) - path_u.mean()
    path_v += place[0] * np.sin(place[1]) - path_v.mean()
    return np.min(np.hypot(u[..., None] - path_u, v[..., None] - path_v), axis=-1)


if __name__ == "__main__":
    run_script(main)
