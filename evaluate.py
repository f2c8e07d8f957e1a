"""Score the test images with the final detectors, and write the report.

    python evaluate.py                                      continues runs/demo
    python evaluate.py --run runs/NAME --save-maps
    python evaluate.py --run runs/NAME --images FOLDER      scores other images, see llb/new_images.py

Evaluates every detector that stage 2 has finished for all categories (--train-on picks one) and compares them in one
table. A plain folder has no test set: all its images are scored, the dropped ones too.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from llb import tables
from llb.checkpoint import Params, open_checkpoints, restore_params
from llb.config import Evaluate
from llb.console import run_script, say
from llb.data import Dataset, Record
from llb.detectors import is_trained, remembers
from llb.device import start_jax
from llb.files import UserError, discard_files, is_writer, write_json
from llb.flags import parse_flags
from llb.head import Headed, repeated
from llb.images import load_image
from llb.lock import CHANGERS, hold
from llb.maps import check_map_names, map_names, replace_maps, write_maps
from llb.marks import EDITABLE, THRESHOLD_OF, normal_images
from llb.masks import MaskRule, load_masks
from llb.metrics import (
    PixelCounts,
    accumulate,
    image_metrics,
    pixel_metrics_error,
    pixel_metrics_of,
    purification,
    sample_auroc,
)
from llb.new_images import check_flags, score_images
from llb.next_page import write_next_page
from llb.processes import agreed
from llb.protocols import PROTOCOLS, mask_rule
from llb.purify import combine
from llb.report import predicted, write_report
from llb.review import threshold_doubt
from llb.run import find_run, finished_detectors, load_datasets, read_run, run_encoder
from llb.score import heat_maps, score, score_some
from llb.selection import outdated_detectors
from llb.stage import Stage, final_params, load_features, make_stage
from llb.threshold import by_kind, list_digest, threshold_facts
from llb.tiles import shown_tests, small, tiles_file, united, write_tiles
from llb.times import timed

PIXEL_ERROR = 1e-5  # a larger error of the pixel metrics is reported
# of stage 1, so that its scores can stand for a final detector's; for a threshold also what an optimiser was given
SAME, SAME_TRAINING = ("detector", "set", "image_score"), ("steps", "learning_rate", "batch_size")
NONE_ALIKE = "2 sub-models or more of this detector, trained with the same settings (such as --steps)"
OUTDATED = "{} is outdated, and its metrics are left out: {}"


def main() -> None:
    settings = parse_flags(Evaluate)
    check_flags(settings)
    device = start_jax(settings)
    say(device)
    run = find_run(settings)
    if settings.images:
        score_images(run, settings)
        return
    with hold(run, "evaluate", against=CHANGERS):
        run_evaluation(run, settings, device)


def run_evaluation(run: Path, settings: Evaluate, device: str) -> None:
    """Evaluate every finished detector on every category, and write the report. device: of `start_jax`."""
    config = read_run(run, device)
    names = config["categories"]
    detectors = finished_detectors(run, config, settings.train_on)
    encoder = run_encoder(run, config)
    stages = {final: make_stage(run, settings, encoder, config | config["stage2"][final], final) for final in detectors}

    datasets = dict(zip(names, load_datasets(run, config, settings)))
    facts, notes, lists = {}, {}, {}
    for name, dataset in datasets.items():
        purified = tables.read_purified(run / name, dataset)
        lists[name] = purified.indices
        if settings.save_maps:
            check_map_names(dataset.test or dataset.train)
        facts[name] = purification_facts(dataset, purified, run / name)
        notes[name] = [purified.note] * bool(purified.note)
        if not dataset.test:
            notes[name].append("there is no test set: the training images are scored, the dropped ones too")
            say(f"{name}: {notes[name][-1]}")
    stages, outdated = without_outdated(run, datasets, stages, settings.train_on)
    notes = {name: notes[name] + outdated[name] for name in names}

    for name, dataset in datasets.items():
        for final, stage in stages.items():
            chosen = normal_images(config["stage2"][final]["train_on"], run / name, dataset, lists[name])
            known = final in tables.read_metrics(run).get(name, {})
            if agreed(known and evaluated(run / name, stage, dataset, chosen)):
                say(f"{name}: {final} is evaluated; --overwrite scores again")
                continue
            rule = mask_rule(PROTOCOLS.get(config["protocol"]), config["resize"])
            fair = partial(fair_scores, stage, dataset, config)
            with timed(run, name, f"evaluation, {final}", anew=True):
                values = evaluate(stage, dataset, rule, chosen, fair)
            # written after each detector and its files: an interrupted evaluation continues with the first without them
            metrics = tables.read_metrics(run)
            metrics.setdefault(name, {})[final] = values
            write_json(run / tables.METRICS_FILE, metrics)

    if not is_writer():  # of several processes (llb.ablate): what follows reads what process 0 has just written
        return
    metrics = tables.read_metrics(run)
    metrics = {name: metrics[name] | {"purification": facts[name]} for name in names}
    metrics["mean"] = tables.mean_metrics(metrics, names)
    write_json(run / tables.METRICS_FILE, metrics)
    tables.write_metrics_csv(run / "metrics.csv", metrics)
    write_report(run, notes)
    say(tables.summary_table(metrics))
    for name in names:
        for final in tables.detector_names(metrics[name]):
            threshold = tables.read_threshold(run / name, final)
            if threshold and final.startswith(EDITABLE):
                train_on = final.partition("-")[0]
                doubt = threshold_doubt(run / name, datasets[name], config["seed"]) if train_on == "reviewed" else ""
                say(f"{name}, {final}: {tables.threshold_line(threshold, THRESHOLD_OF[train_on])}{doubt}")
    say(f"report: {run / 'report.html'}")


def without_outdated(
    run: Path, datasets: dict[str, Dataset], stages: dict[str, Stage], train_on: str | None
) -> tuple[dict[str, Stage], dict[str, list[str]]]:
    """Take out detectors whose list, or marks, have changed since they were trained, and forget their metrics.

    Returns the other stages, and a note on each outdated detector, by category. If there is no other one, or the
    command names no --train-on, the UserError of the first is raised: it says how to train it again.
    """
    old, outdated, notes = tables.read_metrics(run), {}, {}
    for name, dataset in datasets.items():
        shown = tables.detector_names(old.get(name, {}) | dict.fromkeys([*stages, *predicted(run / name)]))
        changed = outdated_detectors(run, dataset, shown)
        outdated |= changed
        notes[name] = [OUTDATED.format(*pair) for pair in changed.items()]
    refused = [final for final in stages if final in outdated]
    if refused and (train_on is None or len(refused) == len(stages)):
        raise outdated[refused[0]]
    for pair in outdated.items():
        say(OUTDATED.format(*pair))
    tables.forget_metrics(run, (*datasets, "mean"), list(outdated))
    return {final: stage for final, stage in stages.items() if final not in outdated}, notes


def evaluate(
    stage: Stage,
    dataset: Dataset,
    rule: MaskRule,
    normal: np.ndarray,
    fair: Callable[[Params | Headed, np.ndarray, Sequence[str]], np.ndarray | None],
) -> dict[str, float | None]:
    """Maps, scores and metrics of one final detector on one category. Writes its tables, tiles and maps.

    normal: int (n,), of `normal_images`; fair: `fair_scores`, which wants only the last three.
    """
    name, final = dataset.category, stage.final
    folder, size = stage.run / name, stage.setup.image_size
    # a plain folder has no test set: score the images it was trained on, and the dropped ones too
    part = "test" if dataset.test else "train"
    records = getattr(dataset, part)
    features = load_features(stage, dataset, part)
    params = final_params(stage, name)

    # ---- scores; only one batch of maps is in memory: it is counted together with its masks ----
    scores, counts = np.empty(len(records), np.float32), PixelCounts()
    no_mask = []  # paths of defective images: their pixels are not counted
    maps_folder = folder / f"maps-{final}"
    unfinished = maps_folder.with_name(f".{maps_folder.name}.tmp")
    discard_files(unfinished, map_names(records))
    everything, title = np.arange(len(records)), f"{name}, test on {final}"
    for positions, score_k, maps_k in score(params, stage.setup, features, everything, title, with_maps=True):
        batch, maps = [records[i] for i in positions], maps_k[:, 0]  # maps: float32 (b, S, S)
        scores[positions] = score_k[:, 0]
        masks, judged = load_masks(dataset.root, batch, size, rule)
        counts = accumulate(counts, masks[judged], maps[judged])
        no_mask += [record.path for record, known in zip(batch, judged) if record.label == 1 and not known]
        if stage.settings.save_maps:
            write_maps(unfinished, batch, maps)
    own_scores, remembering = scores, remembers(stage.setup.detector, stage.setup.settings)
    on_learned = part == "train" and remembering
    if on_learned and (others := fair(params, everything, SAME)) is not None:
        scores = others
        say(f"{name}, {final}: the images are scored by stage 1's sub-models that have not seen them")
    elif on_learned:
        say(f"{name}, {final}: it scores images that it has learned from far too low; give it new ones with --images")

    # ---- metrics ----
    labels = [record.label for record in records]
    samples = sample_auroc([record.path for record in records], labels, scores, dataset.layout)
    metrics = image_metrics(labels, scores) | samples | pixel_metrics_of(counts)
    tables.write_missing_masks(stage.run, name, no_mask)
    if no_mask:
        say_once(f"{name}: {tables.missing_masks_line(no_mask, labels.count(1))}")
    error = max(pixel_metrics_error(counts).values())
    if error > PIXEL_ERROR:
        say(f"{name}: so many scores are nearly equal that pixel metrics on {final} may be off by {error:.1g}")

    # ---- write; without metrics, which come last, it is not evaluated: killed in between, it is scored again ----
    tables.forget_metrics(stage.run, [name, "mean"], [final])
    # training images have set the threshold: their share above it says nothing of new images
    judges = labels if part == "test" else [None] * len(labels)
    alike = SAME + SAME_TRAINING * is_trained(stage.setup.detector)  # steps change the scale of its scores
    facts = threshold_facts(fair(params, normal, alike), judges, scores)
    facts |= {"out_of_fold": int(remembering), "list": list_digest(normal)}
    if not len(normal):
        say(f"{name}, {final}: no threshold, since every image that is not dropped is called defective")
    elif facts["threshold"] is None:
        say(f"{name}, {final}: no threshold: what it has learned from scores too low, and stage 1 has not {NONE_ALIKE}")
    tables.write_threshold(folder, final, facts)
    limit = facts["threshold"] if part == "test" else None
    tables.write_kinds(folder, final, by_kind([r.kind for r in records], labels, scores, limit))
    shown = united(shown_tests(scores, labels, limit))
    # its maps of images that it has learned from show nothing; the report shows stage 1's maps of the suspects
    shown = shown[:0] if on_learned else shown
    write_test_tiles(stage, dataset, records, heat_maps(params, stage.setup, features, shown, "examples"))
    if final.startswith("reviewed"):
        write_next_page(stage, dataset, params, None if dataset.test else own_scores)
    if stage.settings.save_maps:
        replace_maps(unfinished, maps_folder, records)
    tables.write_predictions(folder, final, records, scores)
    return metrics


def fair_scores(
    stage: Stage,
    dataset: Dataset,
    config: dict[str, Any],
    params: Params | Headed,
    images: np.ndarray,
    alike: Sequence[str],
) -> np.ndarray | None:
    """What training images score, as if they were new: float32 (n,). None if the detector cannot say, or n is 0.

    A detector that scores what it has learned from far too low gets stage 1's scores by the sub-models that have not
    seen the image, if stage 1 had the same detector (`remembers`). With a head these score them once more: it has
    learned from some of their patches, so that with a head they are not quite new.

    params: the final detector; images: int (n,); alike: names of settings that stage 1 must share with it.
    """
    if not len(images):
        return None
    if remembers(stage.setup.detector, stage.setup.settings):
        final = config["stage2"][stage.final]
        if config["submodels"] == 1 or any(final[name] != config[name] for name in alike):
            return None
        subset, scores = tables.read_submodels(stage.run / dataset.category)
        if isinstance(params, Headed):
            with open_checkpoints(stage.run / dataset.category / "stage1") as checkpoints:
                params = Headed(restore_params(checkpoints), repeated(params.head, config["submodels"]))
            scores[images] = scored(stage, dataset, images, params)
        return combine(scores, subset, config["folds"] == "others", False, "out-of-fold")[images]
    return scored(stage, dataset, images, params)[:, 0]


def scored(stage: Stage, dataset: Dataset, indices: np.ndarray, params: Params | Headed) -> np.ndarray:
    """Training images by K models: float32 (n, K)."""
    features, title = load_features(stage, dataset, "train"), f"{dataset.category}, threshold of {stage.final}"
    return score_some(params, stage.setup, features, indices, title)


@cache
def say_once(line: str) -> None:
    """Print what holds for all detectors of a category, which are evaluated one after another."""
    say(line)


def write_test_tiles(
    stage: Stage, dataset: Dataset, records: Sequence[Record], maps: Iterable[tuple[int, np.ndarray]]
) -> None:
    """tiles-<final>.json: images of the report. maps: of `heat_maps`, whose indices are places in `records`."""
    size, shown = stage.setup.image_size, []
    for index, heat in maps:
        record = records[index]
        image = load_image(dataset.root / record.path, size, dataset.white, dataset.resize)
        masks, _ = load_masks(dataset.root, [record], size, MaskRule(resize=dataset.resize))
        shown.append((record.path, small(image), small(heat), masks[0]))
    write_tiles(stage.run / dataset.category / tiles_file(stage.final), shown)


def evaluated(folder: Path, stage: Stage, dataset: Dataset, normal: np.ndarray) -> bool:
    """Whether nothing is left to do for this detector. normal: int (n,), of `normal_images`, which may have changed."""
    settings, final = stage.settings, stage.final
    if settings.overwrite or (settings.save_maps and not (folder / f"maps-{final}").exists()):
        return False
    try:
        rows = tables.read_table(folder / f"predictions-{final}.csv", ("path", "score", "label"))
        kinds = [tuple(row.values()) for row in tables.read_table(folder / tables.kinds_file(final), tables.KINDS)]
        facts = tables.read_threshold(folder, final, also_none=True)
    except UserError:  # damaged: written again
        return False
    if not facts or facts.get("list") != list_digest(normal):  # without: evaluated by an older version
        return False
    records = dataset.test or dataset.train
    labels, scores = [record.label for record in records], np.array([row["score"] for row in rows], np.float32)
    if [(row["path"], row["label"]) for row in rows] != [(record.path, record.label) for record in records]:
        return False  # labels may be corrected in a list
    return kinds == by_kind([record.kind for record in records], labels, scores, facts["threshold"])


def purification_facts(dataset: Dataset, purified: tables.Choice, folder: Path) -> dict[str, Any]:
    """What purification did, by the list as it is now."""
    kept = np.isin(np.arange(len(dataset.train)), purified.indices)
    return purification([record.label for record in dataset.train], tables.read_scores(folder, dataset)["score"], kept)


if __name__ == "__main__":
    run_script(main)
