"""Do concept maps lie on what their words name? Every vocabulary of a store against its labels, untrained.

    mmdiff-cache extract --config pipelines/concept_maps.py       # 500 scenes, one layer; minutes
    python pipelines/concept_maps.py data/scenes/flux-scenes-words --out concept-maps
    python pipelines/concept_maps.py STORE --split val            # any other store with vocabularies

Claims, fixed before any run: averaged over the words of a vocabulary, the AP of the maps is higher than that
of other pictures' maps (shuffled), of a blob in the middle and of words that name nothing; confirmed
where the 95 % interval of the paired bootstrap over pictures lies above zero. All timesteps
together, then each alone. Writes scores.json, table.md and results.json, from which
the page of a world's claims takes them if `--out` lies beside its tables.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from mmdiff_cache.config import ExtractConfig, data_folder
from mmdiff_cache.datasets.concepts import PRESETS
from mmdiff_cache.experiments.concept_maps import ConceptMapScores, concept_map_scores
from mmdiff_cache.experiments.concept_masks import named_mask
from mmdiff_cache.experiments.page import OtherClaim, write_claims
from mmdiff_cache.experiments.statistics import verdict
from mmdiff_cache.store.reader import Store, open_store
from mmdiff_cache.training.evaluate import pick_split

VOCABULARIES = ("segmentation", "saliency", "depth", "scenes-classes", "untrained-4", "untrained-5")


def extract() -> ExtractConfig:
    """Scenes that nothing was chosen on, all words, and one layer, which is not looked at."""
    return ExtractConfig(
        dataset="scenes",
        splits=("final",),
        backbone="flux-scenes",
        layers=("single.1",),
        concepts={name: PRESETS[name] for name in VOCABULARIES},
        store=str(data_folder() / "scenes" / "flux-scenes-words"),
    )


def readings(store: Store, split: str) -> Iterator[tuple[str, ConceptMapScores]]:
    """Each vocabulary whose words name masks, over all timesteps and at each alone."""
    reader = store[split]
    for name, words in reader.vocabularies.items():
        if not any(named_mask(word, reader.label_specs) for word in words):
            continue
        nothing = f"untrained-{len(words)}"
        others = nothing if nothing in reader.vocabularies else None
        for timesteps in (reader.timesteps, *((t,) for t in reader.timesteps)):
            title = f"{name}, t = {', '.join(f'{t:g}' for t in timesteps)}"
            yield title, concept_map_scores(store, name, split, timesteps=timesteps, others=others)


def main() -> None:
    """Read the command line, score, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("--split", help="by default the one that evaluate takes")
    parser.add_argument("--out", type=Path, default=Path("concept-maps"), help="folder of the results")
    asked = parser.parse_args()
    store = open_store(asked.store)
    found = dict(readings(store, pick_split(store, asked.split)))
    texts = [f"**{name}**: {claim_words(one)}\n\n{one}\n" for name, one in found.items()]
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "scores.json").write_text(json.dumps({name: one.to_json() for name, one in found.items()}))
    (asked.out / "table.md").write_text("\n".join(texts))
    write_claims(
        asked.out,
        f"Concept maps of {store.path.name}",
        f"python pipelines/concept_maps.py {asked.store} --out {asked.out}",
        [
            OtherClaim(claim=f"maps > {control}", task=name, metric="AP, mean over words", differences=[gain])
            for name, one in found.items()
            for control, gain in one.mean.gains.items()
        ],
    )
    print("\n".join(texts))  # noqa: T201


def claim_words(found: ConceptMapScores) -> str:
    """The verdicts on the mean over words."""
    gains = found.mean.gains
    return ", ".join(f"over {control} {gain} {verdict([gain])}" for control, gain in gains.items())


if __name__ == "__main__":
    main()
