"""More samples for a store that is there: the bytes of one large run, in the order in which they came."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmdiff_cache.config import ExtractConfig
from mmdiff_cache.datasets.images import ImageFolder
from mmdiff_cache.errors import DataError, StoreError
from mmdiff_cache.extraction.plan import plan
from mmdiff_cache.extraction.repair import repair
from mmdiff_cache.extraction.run import extract
from tests.store.synthetic import counted_files


def picture(folder: Path, name: str) -> None:
    folder.mkdir(exist_ok=True)
    noise = np.random.default_rng(sum(name.encode())).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / name)


def test_a_larger_limit_gives_the_bytes_of_one_run(config: ExtractConfig, tmp_path: Path) -> None:
    larger, config = config, replace(config, limit=3)
    extract(config)
    with pytest.raises(StoreError, match="add the new ones with --append"):
        extract(larger)
    assert plan(larger).done == 3
    assert "the store was planned without 2 of them; --append adds those" in str(plan(larger))
    assert "--append" not in str(plan(config))
    store = extract(larger, append=True)
    assert store["val"].finished == (0, 1, 2, 3, 4)
    once = extract(replace(larger, store=str(tmp_path / "once")))
    assert counted_files(store.path) == counted_files(once.path)
    assert extract(config)["val"].ids == store["val"].ids, "the smaller plan is contained in it"


def test_new_pictures_go_behind_the_old_ones_whatever_their_names(
    config: ExtractConfig, tmp_path: Path
) -> None:
    folder = tmp_path / "pictures"
    for name in ("b.png", "d.png", "e.png"):
        picture(folder, name)
    config = replace(config, dataset="images", data_root=str(folder), splits=None, limit=None)
    extract(config)
    for name in ("a.png", "c.png"):
        picture(folder, name)
    with pytest.raises(StoreError, match="samples of all is 3 in the store, 5 was asked; add the new ones"):
        extract(config)
    store = extract(config, append=True)
    assert store["all"].ids == ("b.png", "d.png", "e.png", "a.png", "c.png")
    whole = counted_files(store.path)
    assert counted_files(extract(config).path) == whole
    (store.path / "all.zarr/hidden_states/c.3.0.0.0.0.0.0").unlink()
    assert repair(store.path).sound
    assert counted_files(store.path) == whole


def test_pictures_that_are_gone_are_named_and_nothing_is_lost(config: ExtractConfig, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    for name in ("b.png", "d.png", "e.png"):
        picture(folder, name)
    config = replace(config, dataset="images", data_root=str(folder), splits=None, limit=None)
    before = counted_files(extract(config).path)
    picture(folder, "f.png")
    (folder / "e.png").unlink()
    with pytest.raises(DataError, match=r"'e\.png' of .* is no longer in split all"):
        extract(config, append=True)
    picture(folder, "e.png")
    Image.new("RGB", (50, 40)).save(folder / "e.png")
    with pytest.raises(DataError, match=r"'e\.png' was finished before and is another picture by now"):
        extract(config, append=True)
    kept = counted_files(Path(str(config.store)))
    changed = {name for name in before if kept[name] != before[name]}
    assert {name.rpartition("/")[2] for name in changed} == {"zarr.json", "manifest.json"}
    picture(folder, "e.png")
    assert extract(config, append=True)["all"].finished == (0, 1, 2, 3)


def test_the_order_in_which_a_data_set_lists_its_pictures_does_not_matter(
    config: ExtractConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "pictures"
    for name in ("b.png", "d.png", "e.png"):
        picture(folder, name)
    config = replace(config, dataset="images", data_root=str(folder), splits=None, limit=None)
    before = counted_files(extract(config).path)
    listed = ImageFolder.sample_ids  # load() goes by it too
    monkeypatch.setattr(ImageFolder, "sample_ids", lambda self, split: listed(self, split)[::-1])
    (Path(str(config.store)) / "all.zarr/hidden_states/c.0.0.0.0.0.0.0").unlink()
    assert counted_files(extract(config).path) == before
