"""What 8-bit weights change: relative L2 of features and scores against full weights.

    python benchmarks/bench_quantisation.py [--backbone flux-scenes] [--samples 16]

Prints a table: a row for each layer, over the default timesteps, and one for the concept scores.
bfloat16 is also compared with float32, for what 8 bits add to has that size already.
"""

import argparse

import torch

import mmdiff_cache as mm
from mmdiff_cache.extraction.extractor import Captured
from mmdiff_cache.extraction.run import load_extractor
from mmdiff_cache.extraction.worker import load_batch
from mmdiff_cache.records import PreparedSample

CASES = (("float32", "none"), ("float32", "float8"), ("bfloat16", "none"), ("bfloat16", "float8"))
COMPARED = ((1, 0), (2, 0), (3, 2))
"""Which of CASES is compared with which."""


def capture(backbone: str, dtype: str, quantisation: str, samples: int) -> Captured:
    """One pass over the first scenes of val."""
    plan = mm.plan(
        mm.ExtractConfig.from_json(
            {
                "backbone": backbone,
                "dtype": dtype,
                "quantisation": quantisation,
                "splits": ["val"],
                "limit": samples,
                "compile": False,
            }
        )
    )
    loaded = load_batch(plan, "val", range(samples))
    extractor = load_extractor(plan.config, plan.backbone)
    return extractor.capture([sample for sample in loaded if isinstance(sample, PreparedSample)])


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 distance."""
    return float((got.float() - expected.float()).norm() / expected.float().norm())


def line(name: str, row: list[float]) -> str:
    """A row of the table."""
    return f"| {name} | {' | '.join(f'{value:.4f}' for value in row)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--backbone", default="flux-scenes")
    parser.add_argument("--samples", type=int, default=16)
    options = parser.parse_args()
    layers = mm.plan(mm.ExtractConfig(backbone=options.backbone, limit=1)).schema.layers
    passes = [capture(options.backbone, dtype, kind, options.samples) for dtype, kind in CASES]
    pairs = [(passes[one], passes[other]) for one, other in COMPARED]
    titles = [f"{' '.join(CASES[one])} against {' '.join(CASES[other])}" for one, other in COMPARED]
    print(f"| | {' | '.join(titles)} |\n|---{'|---' * len(titles)}|")
    for number, layer in enumerate(layers):
        row = [
            relative(got.hidden_states[:, :, number], full.hidden_states[:, :, number]) for got, full in pairs
        ]
        print(line(layer, row))
    for name in pairs[0][0].concept_scores:
        row = [relative(got.concept_scores[name], full.concept_scores[name]) for got, full in pairs]
        print(line(f"scores {name}", row))


if __name__ == "__main__":
    main()
