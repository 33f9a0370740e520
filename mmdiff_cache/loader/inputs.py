"""What a model reads of every sample: names and defaults settled against a store.

`settle` is the one place that says what can be read together. The loader reads by its result, a training
writes it into its configuration, and a batch that was read for several models is divided by it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from numpy.typing import NDArray

from mmdiff_cache.config import ConceptMapsConfig, Source, VariantUse, filled
from mmdiff_cache.errors import ConfigError
from mmdiff_cache.store.concepts import attention_blocks, attention_maps, concept_maps, mapped_blocks
from mmdiff_cache.store.reader import SplitReader
from mmdiff_cache.store.schema import StoreSchema

NO_CONCEPTS = "none"
CROSS_ATTENTION = "cross_attention"
"""The averaged attention of image to text, in the place of a vocabulary's maps (Paper: Tab. 5)."""
WITHOUT_TRANSFORMER = ("latents", "images")
"""Sources that use nothing of the transformer, so that no concept maps go with them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Guide:
    """Maps beside the features: what is stored, and how it is read."""

    name: str
    """A vocabulary, or `cross_attention`."""
    how: ConceptMapsConfig
    """With blocks and timesteps."""
    stored: tuple[str, ...]
    """The blocks on the stored axis."""
    channels: tuple[str, ...]
    """What each map is of: a concept, or a block whose attention it is."""

    def maps(self, values: NDArray[Any]) -> NDArray[Any]:
        """Stored values of the timesteps, [B T block K h w] or [B T block h w], to maps [B K h w]."""
        blocks = [self.stored.index(block) for block in filled(self.how.blocks)]
        if self.name == CROSS_ATTENTION:
            return attention_maps(values, blocks)
        return concept_maps(values, blocks, self.how.temperature, self.how.reading)


def make_guide(
    schema: StoreSchema, name: str, how: ConceptMapsConfig, timesteps: Sequence[float], where: object
) -> Guide:
    """Fill in blocks and timesteps. Raises ConfigError for maps, blocks or choices that a store lacks."""
    vocabularies = {vocabulary.name: vocabulary for vocabulary in schema.vocabularies}
    if name == CROSS_ATTENTION:
        if not schema.cross_attention:
            raise ConfigError(f"{where} has no cross-attention maps; extract with --cross-attention")
        if (how.temperature, how.reading) != (1.0, "softmax_then_mean"):
            raise ConfigError(
                "concept_maps.temperature and reading are of a softmax over concepts, which cross_attention "
                "has not; leave them out"
            )
        stored, default = schema.cross_attention, attention_blocks(schema)
    else:
        check_stored("concept vocabulary", [name], vocabularies, where)
        stored, default = vocabularies[name].blocks, mapped_blocks(schema, name)
    blocks = how.blocks or default
    check_stored(f"block of {name}", blocks, stored, where)
    blocks = tuple(block for block in stored if block in blocks)
    chosen = how.timesteps or tuple(dict.fromkeys(timesteps))
    return Guide(
        name=name,
        how=replace(how, blocks=blocks, timesteps=chosen),
        stored=stored,
        channels=blocks if name == CROSS_ATTENTION else vocabularies[name].concepts,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What is read of every sample, in this order."""

    source: Source
    layers: tuple[str, ...]
    """Of the backbone; of the encoder where the source is `discriminative`."""
    timesteps: tuple[float, ...]
    variants: tuple[int, ...]
    """Those that a training may read, or that stand beside each other."""
    variant_use: VariantUse
    guides: tuple[Guide, ...]
    discriminative: tuple[str, ...]

    @property
    def stacked(self) -> bool:
        """Whether the variants stand beside each other as timesteps."""
        return self.variant_use == "stack"

    @property
    def maps(self) -> tuple[tuple[int | None, float | None], ...]:
        """The T axis: variant (None for whichever is read) and timestep (None for what has none)."""
        if self.source != "hidden_states":
            return ((None, None),)
        variants = self.variants if self.stacked else (None,)
        return tuple((variant, timestep) for variant in variants for timestep in self.timesteps)

    @property
    def beside(self) -> tuple[str, ...]:
        """The encoders that join as guidance: none where one is the source itself."""
        return () if self.source == "discriminative" else self.discriminative


def settle(
    reader: SplitReader,
    schema: StoreSchema,
    *,
    source: Source = "hidden_states",
    layers: Sequence[str] | None = None,
    timesteps: Sequence[float] | None = None,
    variants: Sequence[int] | None = None,
    variant_use: VariantUse = "augment",
    concepts: str | Sequence[Guide] | None = None,
    concept_maps: ConceptMapsConfig | None = None,
    discriminative: Sequence[str] = (),
) -> Inputs:
    """Check every choice against a store and fill what is None. Raises ConfigError for what cannot be."""
    check_stored("discriminative encoder", discriminative, reader.discriminative, reader.path)
    chosen = tuple(reader.timesteps[reader.timestep_index(t)] for t in timesteps or reader.timesteps)
    if concepts is None or concepts == NO_CONCEPTS:
        guides: tuple[Guide, ...] = ()
        if concept_maps is not None and concept_maps.shuffled:
            raise ConfigError("concept_maps.shuffled needs concept maps; name a vocabulary with --concepts")
    elif isinstance(concepts, str):
        how = concept_maps or ConceptMapsConfig()
        if how.timesteps is not None:
            how = replace(
                how, timesteps=tuple(reader.timesteps[reader.timestep_index(t)] for t in how.timesteps)
            )
        guides = (make_guide(schema, concepts, how, chosen, reader.path),)
    else:
        guides = tuple(concepts)
    _check_source(source, guides, discriminative)
    return Inputs(
        source=source,
        layers=_layers(reader, source, layers, discriminative),
        timesteps=chosen,
        variants=_variants(reader, source, variants, variant_use),
        variant_use=variant_use,
        guides=guides,
        discriminative=tuple(discriminative),
    )


def plain_variant(reader: SplitReader) -> int:
    """The variant that evaluation reads: the first that is not mirrored."""
    return _unflipped(reader)[0]


def check_stored(what: str, names: Iterable[str], stored: Iterable[str], where: object) -> None:
    """Raise ConfigError for the first name that is not stored, with those that are."""
    found = list(stored)
    for name in names:
        if name not in found:
            raise ConfigError(f"{what} {name!r} is not in {where}; stored: {', '.join(found) or 'none'}")


def _check_source(source: Source, guides: Sequence[Guide], discriminative: Sequence[str]) -> None:
    if source in WITHOUT_TRANSFORMER and guides:
        raise ConfigError(
            f"source {source!r} uses nothing of the transformer, so concepts must be none, "
            f"got {guides[0].name!r}"
        )
    if source == "images" and discriminative:
        raise ConfigError("source 'images' uses the pictures alone, so discriminative must be empty")
    if source == "discriminative" and len(discriminative) != 1:
        raise ConfigError(
            f"source 'discriminative' is the features of exactly one encoder, got {len(discriminative)}; "
            "--set discriminative=NAME"
        )


def _layers(
    reader: SplitReader, source: Source, layers: Sequence[str] | None, discriminative: Sequence[str]
) -> tuple[str, ...]:
    if source == "discriminative":
        stored = reader.discriminative[discriminative[0]].layers
        check_stored(f"block of {discriminative[0]}", layers or (), stored, reader.path)
        return tuple(layers or stored)
    for layer in layers or ():
        reader.layer_index(layer)
    return tuple(layers or reader.layers)


def _variants(
    reader: SplitReader, source: Source, variants: Sequence[int] | None, use: VariantUse
) -> tuple[int, ...]:
    """Of latents and pictures there is one reading alone; only hidden states differ in their noise."""
    unflipped = _unflipped(reader)
    if use == "stack" and source != "hidden_states":
        raise ConfigError(
            f"variant_use 'stack' joins noise draws, which source {source!r} has not; leave it at 'augment'"
        )
    if variants is None:
        if source in WITHOUT_TRANSFORMER:
            return unflipped[:1]
        return unflipped if use == "stack" else tuple(range(len(reader.variants)))
    flipped = [variant for variant in map(reader.variant_index, variants) if variant not in unflipped]
    if flipped and (use == "stack" or source in WITHOUT_TRANSFORMER):
        why = "stacked draws are" if use == "stack" else f"source {source!r} is stored"
        raise ConfigError(
            f"variant {flipped[0]} of {reader.path} is mirrored, but {why} of the picture as it is; "
            f"choose among {', '.join(map(str, unflipped))}"
        )
    return tuple(dict.fromkeys(variants))


def _unflipped(reader: SplitReader) -> tuple[int, ...]:
    found = tuple(number for number, variant in enumerate(reader.variants) if not variant.flipped)
    if not found:
        raise ConfigError(
            f"every variant of {reader.path} is mirrored, but evaluation needs pictures as they are; "
            "keep an unmirrored variant when the store is made"
        )
    return found
