"""The next page: after a look, the unseen training images that the `reviewed` detector suspects most.

RUN/<category>/tiles-next-<final>.json    PAGE images with the detector's maps, the first suspect first

A head has learned what a person minds, so it ranks what is left better than stage 1 did: on the tiles, after 96 images,
its next page held 1.6 to 2.8 times the defects of the next ones by stage 1 (llb/RESULTS.md). The report shows this
page behind those that are marked. Its images are picked and not drawn: they are looked at for the defects, and the
estimate of what is left (llb.unseen) takes them as known.
"""

import numpy as np

from llb.checkpoint import Params
from llb.console import say
from llb.data import Dataset
from llb.head import Headed
from llb.images import load_image
from llb.marks import UNSAID, read_marks
from llb.pages import PAGE
from llb.score import heat_maps, score
from llb.stage import Stage, load_features
from llb.tiles import LOOKED_AT, next_tiles_file, small, write_tiles


def scores_of(stage: Stage, dataset: Dataset, indices: np.ndarray, params: Params | Headed, why: str) -> np.ndarray:
    """Training images by K models: float32 (n, K). why: for the progress bar."""
    features, title = load_features(stage, dataset, "train"), f"{dataset.category}, {why} {stage.final}"
    return np.concatenate([score_k for _, score_k, _ in score(params, stage.setup, features, indices, title)])


def write_next_page(stage: Stage, dataset: Dataset, params: Params | Headed, known: np.ndarray | None) -> None:
    """Write the tiles of the next page; without an unseen image there are none.

    known: what the detector scores the training images, float32 (N,), if that was worked out already.
    """
    name, size = dataset.category, stage.setup.image_size
    unseen = np.flatnonzero(read_marks(stage.run / name, dataset) == UNSAID)
    tiles = []
    if len(unseen):
        scores = scores_of(stage, dataset, unseen, params, "next page by")[:, 0] if known is None else known[unseen]
        first = unseen[np.argsort(-scores, kind="stable")[:PAGE]]
        features, resize = load_features(stage, dataset, "train"), dataset.resize
        for index, heat in heat_maps(params, stage.setup, features, first, "next page"):
            path = dataset.train[index].path
            image = load_image(
                dataset.root / path, LOOKED_AT, dataset.white, resize and round(resize * LOOKED_AT / size)
            )
            tiles.append((path, image, small(heat, LOOKED_AT), None))
        say(f"{name}: the report has a next page, the {len(first)} unseen images that {stage.final} suspects most")
    write_tiles(stage.run / name / next_tiles_file(stage.final), tiles, LOOKED_AT)
