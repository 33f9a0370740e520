"""Fusion weights at edges and inside: regions by hand, weights that are planted, and real small runs."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from mmdiff_cache.config import AggregatorConfig
from mmdiff_cache.datasets.scenes import LABELS as SCENES_LABELS
from mmdiff_cache.datasets.scenes import RenderedScenes
from mmdiff_cache.datasets.transforms import prepare
from mmdiff_cache.errors import ConfigError
from mmdiff_cache.experiments.fusion_report import check_alike, claims, example_sheet, verdict_words
from mmdiff_cache.experiments.fusion_weights import (
    ALL,
    EDGES,
    INSIDE,
    WeighedSplit,
    fusion_weights,
    open_weighed,
    paired,
)
from mmdiff_cache.experiments.statistics import Difference
from mmdiff_cache.experiments.token_edges import STEP, token_regions
from mmdiff_cache.models.aggregator import TimestepProjection, TokenAggregator
from mmdiff_cache.models.mmdiff import MMDiff
from mmdiff_cache.store.schema import LabelArray
from mmdiff_cache.store.writer import open_writer
from mmdiff_cache.training.run import Run, train
from pipelines import fusion_weights as recipe
from tests.learnable import GRID, LABELS, PATCH, TIMESTEPS, make_features, make_manifest, make_schema
from tests.training.conftest import TINY, small_config

SPECS = {spec.name: spec for spec in LABELS}
AT_EDGE, PLACE = 0, 1
"""Channels of the scenes' features: 1 at edges, else 0; and 1 in the lower half of every picture."""
PICTURES = 10
PLAIN = replace(TINY, norm="none")


def regions_of(label: str, rows: Sequence[Sequence[float]], grid: tuple[int, int]) -> list[str]:
    """Tokens of a picture as text: e at edges, i inside, - neither."""
    values = np.array(rows, np.float32 if label == "depth" else np.uint8)
    found = token_regions(values[None], SPECS[label], grid)
    assert not (found.edges & found.inside).any()
    letters = np.where(found.edges[0], "e", np.where(found.inside[0], "i", "-"))
    return ["".join(row) for row in letters.reshape(grid)]


def test_edges_of_ids() -> None:
    """Void is no class; a token with void and one class may hide an edge. Borders between tokens are none."""
    rows = [[0, 0, 1, 2, 255, 3], [0, 0, 1, 1, 3, 3], [2, 2, 255, 0, 255, 255], [2, 2, 1, 1, 255, 255]]
    assert regions_of("segmentation", rows, (2, 3)) == ["ie-", "ie-"]
    assert regions_of("saliency", [[0, 1, 1, 1], [0, 0, 1, 1]], (1, 2)) == ["ei"]


def test_edges_of_depth() -> None:
    """A step in any direction, either way; a slope has none; nothing is known of 0 and 50 m."""
    far = 1 + STEP + 1e-3
    assert regions_of("depth", [[1, 1, 1, far], [1, 1, 1, far]], (1, 2)) == ["ie"]
    assert regions_of("depth", [[far, far, 1, 1.1], [1, 1, 1.15, 1.3]], (1, 2)) == ["ei"]
    assert regions_of("depth", [[1, 0, 1, 50], [1, 0, far, 2]], (1, 2)) == ["-e"]
    assert regions_of("depth", [[9, 0, 1, 50], [0, 2, 1, 1]], (1, 2)) == ["--"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real scenes of 32 px, whose features know where the edges are, beside noise."""
    path, size = tmp_path_factory.mktemp("stores") / "scenes", GRID * PATCH
    schema = make_schema(labels=tuple(LabelArray(spec=spec, canvas=(size, size)) for spec in SCENES_LABELS))
    scenes, spec = RenderedScenes(size), SCENES_LABELS[0]
    with open_writer(
        path, make_manifest(schema, {"train": 8, "test": PICTURES}, "scenes", "empty")
    ) as writer:
        for split in ("train", "test"):
            for partition in writer.pending(split):
                with writer.begin(partition) as out:
                    for offset, sample_id in enumerate(out.ids):
                        scene = scenes.load(split, int(sample_id.rsplit("-", 1)[1]))
                        sample = prepare(scene, size, "", specs=SCENES_LABELS)
                        features = make_features(schema, [sample_id])
                        edges = token_regions(sample.labels[spec.name][None], spec, schema.grid).edges
                        features.hidden_states[..., AT_EDGE] = edges.reshape(GRID, GRID)
                        features.hidden_states[..., PLACE] = (np.arange(GRID) >= GRID // 2)[:, None]
                        out.write(offset, [sample], features)
                    out.commit()
    return path


@pytest.fixture(scope="module")
def run(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """A run of two steps; the same one for the same changes."""
    folder, runs = tmp_path_factory.mktemp("runs"), dict[str, Run]()

    def get(**changes: Any) -> Run:
        name = repr(sorted(changes.items()))
        if name not in runs:
            values: dict[str, Any] = {"aggregator": PLAIN, "steps": 2, **changes}
            runs[name] = train(small_config(store, folder / str(len(runs)), **values))
        return runs[name]

    return get


def planted(run: Run, channel: int, slopes: dict[float, float]) -> WeighedSplit:
    """The run with weights softmax(slope x) over its timesteps, x being a channel of the features."""
    weighed = open_weighed(run)
    assert isinstance(weighed.model, MMDiff)
    for aggregator in weighed.model.aggregators:
        assert isinstance(aggregator, TokenAggregator)
        everything: list[nn.Module] = [aggregator.transformer, aggregator.projections, aggregator.weight_head]
        for module in everything:
            for parameter in module.parameters():
                parameter.zero_()
        aggregator.weight_head.weight[0, 0] = 1
        for projection, t in zip(aggregator.projections, weighed.timesteps, strict=True):
            assert isinstance(projection, TimestepProjection)
            projection.linear.weight[0, channel] = slopes[t]
    return weighed


SLOPES = dict(zip(TIMESTEPS, (-1.0, 0.0, 1.0), strict=True))
"""Where the channel is 1, weight goes from the noisiest timestep to the cleanest."""


def test_weights_that_know_the_edges_give_what_was_planted(run: Callable[..., Run]) -> None:
    found = fusion_weights(planted(run(), AT_EDGE, SLOPES), draws=300)
    times, slopes = np.array(TIMESTEPS), np.array([SLOPES[t] for t in TIMESTEPS])
    there, elsewhere = np.exp(slopes) / np.exp(slopes).sum(), np.full(len(times), 1 / len(times))
    for one in (*found.layers, found.mean):
        np.testing.assert_allclose(one.weights[EDGES], there, rtol=1e-5)
        np.testing.assert_allclose(one.weights[INSIDE], elsewhere, rtol=1e-5)
        for gap, expected in zip(one.by_timestep, there - elsewhere, strict=True):
            assert (gap.estimate, gap.low, gap.high) == pytest.approx((expected,) * 3, abs=1e-6)
        assert one.shift.estimate == pytest.approx((there - elsewhere) @ times, abs=1e-6)
        assert abs(one.shuffled.estimate) < 0.6 * abs(one.shift.estimate)
        assert one.beyond_shuffled.high < 0
    assert all(gains[0].low > 0 for gains in claims([found]).values())


def test_weights_that_know_the_place_alone_are_no_better_than_shuffled(run: Callable[..., Run]) -> None:
    """Of a permutation of pictures the mean is the same: nothing is left beyond it, whatever the shift."""
    found = fusion_weights(planted(run(), PLACE, SLOPES), draws=300)
    assert found.mean.shift.estimate != 0
    assert found.mean.beyond_shuffled.estimate == pytest.approx(0, abs=1e-7)
    assert found.mean.beyond_shuffled.low < 0 < found.mean.beyond_shuffled.high


@pytest.mark.parametrize("task", ["segmentation", "depth"])
def test_regions_together_are_the_whole(run: Callable[..., Run], task: str) -> None:
    """Weighted by their tokens, and picture by picture; weights are 1 in sum, of every layer."""
    weighed = open_weighed(run(task=task))
    edges = weighed.regions.edges
    means = weighed.means({EDGES: edges, "rest": ~edges, ALL: np.ones_like(edges)})
    share = edges.mean(axis=1)[:, None, None]
    np.testing.assert_allclose(means[EDGES] * share + means["rest"] * (1 - share), means[ALL], rtol=1e-6)
    for values in means.values():
        assert values.shape == (len(weighed.dataset), len(TIMESTEPS), len(weighed.dataset.layers))
        np.testing.assert_allclose(values.sum(axis=1), 1, rtol=1e-5)
    found = fusion_weights(weighed, draws=50)
    assert (found.pictures, found.pictures + found.left_out) == (len(weighed.dataset), PICTURES)
    np.testing.assert_allclose(found.layers[1].weights[ALL], means[ALL].mean(axis=0)[:, 1])
    np.testing.assert_allclose(
        found.mean.mean_t[ALL], np.mean([one.mean_t[ALL] for one in found.layers]), rtol=1e-9
    )
    gap = found.mean.mean_t[EDGES] - found.mean.mean_t[INSIDE]
    assert found.mean.shift.estimate == pytest.approx(gap)
    assert sum(gap.estimate for gap in found.mean.by_timestep) == pytest.approx(0, abs=1e-6)


def test_a_paired_difference_is_of_pictures() -> None:
    assert paired(np.array([2.0, 5.0]), np.array([1.0, 2.0])) == Difference(estimate=2.0, low=1.0, high=3.0)


def test_what_cannot_be_measured_is_refused_in_a_line(run: Callable[..., Run], learnable_store: Path) -> None:
    def refused(one: Run, split: str = "test") -> str:
        with pytest.raises(ConfigError) as error:
            open_weighed(one, split)
        assert "\n" not in str(error.value)
        return str(error.value)

    for kind in ("mean", "concat", "global"):
        aggregator = AggregatorConfig(kind=kind, width=16)
        assert f"aggregator.kind {kind}" in refused(run(aggregator=aggregator))
    assert "t = 0.26 alone" in refused(run(timesteps=(0.26,)))
    assert "source 'latents'" in refused(run(source="latents", concepts="none"))
    assert "split 'val'" in refused(run(), "val")
    assert "has 0 with both" in refused(run(stores=(str(learnable_store),)))  # each token is of one class


def test_runs_of_a_table_differ_in_their_seeds_alone(run: Callable[..., Run]) -> None:
    one, other = (fusion_weights(open_weighed(run(seed=seed)), draws=50) for seed in (0, 1))
    check_alike([one, other])
    with pytest.raises(ConfigError, match="given twice"):
        check_alike([one, one])
    for change in ({"task": "depth"}, {"timesteps": (0.5,)}, {"layers": one.layers[:1]}):
        with pytest.raises(ConfigError, match="runs of one table"):
            check_alike([one, replace(other, **change)])


def test_fewer_than_three_runs_leave_a_claim_open() -> None:
    gain = Difference(estimate=1.0, low=0.5, high=1.5)
    assert verdict_words([gain] * 2).startswith("open")
    assert verdict_words([gain] * 3) == "confirmed"
    assert verdict_words([gain, gain, replace(gain, low=-0.1)]) == "open"


def test_examples_show_the_planted_edges(run: Callable[..., Run]) -> None:
    """A map of weights that know the edges is the picture of the edges itself."""
    weighed = planted(run(), AT_EDGE, SLOPES)
    weighed = replace(weighed, regions=replace(weighed.regions, inside=~weighed.regions.edges))
    sheet = example_sheet(weighed, 3)
    assert len(sheet.rows) == 3
    for row in sheet.rows:
        edges, *maps = (tile.picture for tile in row[2:])
        for one in maps:
            np.testing.assert_array_equal(one, edges)


def test_the_recipe_writes_its_files(
    run: Callable[..., Run],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From the runs of a table's row, and from the same runs by their folders."""
    runs = {str(seed): str(run(seed=seed).path) for seed in (0, 1)}
    outcomes = [
        {"row": "four", "task": "segmentation", "runs": runs},
        {"row": "none", "task": "depth", "runs": {}},
    ]
    table = tmp_path / "results.json"
    table.write_text(json.dumps({"outcomes": outcomes}))
    by_row = ["--table", str(table), "--row", "four", "--task", "segmentation"]
    written: list[str] = []
    for out, asked in {"row": by_row, "runs": [*runs.values()]}.items():
        monkeypatch.setattr("sys.argv", ["fusion_weights.py", *asked, "--out", str(tmp_path / out)])
        recipe.main()
        names = {file.name for file in (tmp_path / out).iterdir()}
        assert names == {"table.md", "scores.json", "plot.png", "examples.png", "results.json"}
        written.append((tmp_path / out / "table.md").read_text())
        assert written[-1] in capsys.readouterr().out
        scores = json.loads((tmp_path / out / "scores.json").read_text())
        assert [one["run"] for one in scores["runs"]] == [*runs.values()]
    assert written[0] == written[1]
    monkeypatch.setattr("sys.argv", ["fusion_weights.py", *by_row, "--task", "depth"])
    with pytest.raises(
        SystemExit, match=r"no trainings of row 'four' for depth; it has 'four' \(segmentation\)"
    ):
        recipe.main()
    table.write_text("[]")
    with pytest.raises(SystemExit, match="run the table first"):
        recipe.main()


def test_equal_weights_differ_nowhere(run: Callable[..., Run]) -> None:
    """Neither at the edges of the picture nor at those of others."""
    found = fusion_weights(planted(run(), AT_EDGE, dict.fromkeys(TIMESTEPS, 0.0)), draws=50)
    for one in (*found.layers, found.mean):
        for gap in (*one.by_timestep, one.shift, one.shuffled, one.beyond_shuffled):
            assert (gap.low, gap.high) == pytest.approx((0, 0), abs=1e-7)
