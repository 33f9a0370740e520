"""The mirrored twins of the samples that are scored, which `evaluate --flip` averages over."""

from mmdiff_cache.errors import ConfigError
from mmdiff_cache.loader import WITHOUT_TRANSFORMER, Batch, CachedFeatureDataset, plain_variant


class Mirror:
    """Reads what is stored of the mirrored picture, in the noise draw that a data set is evaluated in.

    The batch read last is kept, so that several predictors of the same batch read it once. Raises ConfigError
    where there is no such variant, or where the data set does not read variants.
    """

    def __init__(self, dataset: CachedFeatureDataset, split: str) -> None:
        self._twins = CachedFeatureDataset(
            dataset.store,
            split,
            layers=dataset.layers,
            timesteps=dataset.timesteps,
            concepts=dataset.inputs.guides,
            source=dataset.inputs.source,
            discriminative=dataset.inputs.discriminative,
            indices=dataset.indices,
            variants=(_twin(dataset),),
            augment_seed=0,  # of one variant every draw is that one
        )
        self._places = {sample: place for place, sample in enumerate(self._twins.indices)}
        self._last: Batch | None = None

    def __call__(self, batch: Batch) -> Batch:
        """The same samples, mirrored, without labels."""
        if self._last is None or self._last.ids != batch.ids:
            self._last = self._twins.batch([self._places[sample] for sample in batch.indices.tolist()])
        return self._last


def _twin(dataset: CachedFeatureDataset) -> int:
    """The variant that mirrors the one that evaluation reads."""
    inputs, reader = dataset.inputs, dataset.reader
    if inputs.stacked or inputs.source in WITHOUT_TRANSFORMER:
        what = "stacked draws" if inputs.stacked else f"source {inputs.source!r}"
        raise ConfigError(f"flip needs features of the mirrored picture; {what} have none, leave it out")
    draw = reader.variants[plain_variant(reader)].noise_draw
    for number, variant in enumerate(reader.variants):
        if variant.flipped and variant.noise_draw == draw:
            return number
    raise ConfigError(
        f"flip needs the mirrored twin of noise draw {draw}, which {reader.path} does not hold; "
        "leave it out, or extract with --flip"
    )
