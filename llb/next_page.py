"""The next page: after a look, the unseen training images that the `reviewed` detector suspects most.

RUN/<category>/tiles-next-<final>.json    if the detector has a head: PAGE images with its maps, the first suspect first

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
from llb.marks import UNSAID, read_marks
from llb.pages import PAGE
from llb.runfiles import own_config
from llb.score import heat_maps, score_some
from llb.stage import Stage, load_features, tile_to_judge
from llb.tiles import LOOKED_AT, next_tiles_file, write_tiles


def write_next_page(stage: Stage, dataset: Dataset, params: Params | Headed, known: np.ndarray | None) -> None:
    """Write the tiles of the next page; none without a head, which alone knows more than stage 1, or without an unseen
    image. Nobody looks if marks are simulated.

    known: what the detector scores the training images, float32 (N,), if that was worked out already.
    """
    if "review" in own_config(stage.run, str(stage.run)):
        return
    name, tiles = dataset.category, []
    unseen = np.flatnonzero(read_marks(stage.run / name, dataset) == UNSAID)
    if len(unseen) and isinstance(params, Headed):
        features, title = load_features(stage, dataset, "train"), f"{name}, next page by {stage.final}"
        if known is None:
            scores = score_some(params, stage.setup, features, unseen, title)[:, 0]
        else:
            scores = known[unseen]
        first = unseen[np.argsort(-scores, kind="stable")[:PAGE]]
        maps = heat_maps(params, stage.setup, features, first, "next page")
        tiles = [tile_to_judge(stage, dataset, index, heat) for index, heat in maps]
        say(f"{name}: the report has a next page, the {len(first)} unseen images that {stage.final} suspects most")
    write_tiles(stage.run / name / next_tiles_file(stage.final), tiles, LOOKED_AT)
