"""Compiled blocks: the same features to rounding, the same few graphs whatever is tapped."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from mmdiff_cache.backbones.base import Backbone
from mmdiff_cache.backbones.registry import describe, load_backbone
from mmdiff_cache.config import ExtractConfig
from mmdiff_cache.errors import BackboneError, ConfigError
from mmdiff_cache.extraction.compilation import compile_blocks, compile_errors
from mmdiff_cache.extraction.plan import plan
from mmdiff_cache.extraction.run import load_extractor
from mmdiff_cache.extraction.taps import capturing
from mmdiff_cache.extraction.worker import load_batch
from mmdiff_cache.records import PreparedSample
from tests.tiny_sd3 import save_tiny_sd3

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")

GRAPHS = 3
"""FLUX: a double block, the first single block, and those whose inputs are views of the one before;
SD3: a block with a second attention, a plain one, the last one."""
TOLERANCE = 1e-6
"""Relative L2 in float32."""


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=["flux", "sd3"])
def folder(request: pytest.FixtureRequest, tiny_flux_folder: Path, tmp_path: Path) -> Path:
    return tiny_flux_folder if request.param == "flux" else save_tiny_sd3(tmp_path / "tiny-sd3")


def tapped(backbone: Backbone, layers: Sequence[str]) -> dict[str, Tensor]:
    noised = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    prompts = backbone.encode_prompts(["", "near"])
    text = prompts.tokens.shape[1]
    with capturing(backbone.blocks, layers, text_tokens=text, image_tokens=16) as seen:
        backbone.forward(noised, torch.tensor([0.5, 0.1]), prompts, backbone.info.guidance)
    return seen


def test_the_number_of_graphs_does_not_depend_on_the_layers_tapped(folder: Path) -> None:
    backbone = load_backbone(describe(str(folder)))
    plain = tapped(backbone, list(backbone.blocks))
    assert compile_blocks(backbone.blocks, read_inside=False, compiler="eager") == tuple(backbone.blocks)
    for count in range(1, len(backbone.blocks) + 1):
        seen = tapped(backbone, list(backbone.blocks)[-count:])
        assert all(torch.equal(seen[address], plain[address]) for address in seen)
    assert counters["stats"]["unique_graphs"] == GRAPHS
    assert not counters["graph_break"]


@pytest.mark.parametrize("inside", [{}, {"concepts": {}, "cross_attention": True}])
def test_with_readers_inside_double_blocks_only_single_ones_are_compiled(
    inside: dict[str, Any], config: ExtractConfig
) -> None:
    """A hook that is put into a block after it was compiled is never called."""
    planned = plan(replace(config, compile=True, **inside))
    extractor = load_extractor(planned.config, planned.backbone)
    compiled = {
        address: slot.block._compiled_call_impl is not None
        for address, slot in extractor.backbone.blocks.items()
    }
    assert compiled == {address: address.startswith("single.") for address in compiled}
    without = load_extractor(replace(planned.config, concepts={}, cross_attention=False), planned.backbone)
    assert all(slot.block._compiled_call_impl is not None for slot in without.backbone.blocks.values())


def test_a_failing_compiler_is_one_line_with_the_way_out(tiny_flux_folder: Path) -> None:
    def broken(graph: object, inputs: object) -> object:
        raise RuntimeError("no C compiler")

    backbone = load_backbone(describe(str(tiny_flux_folder)))
    torch._dynamo.register_backend(broken, name="broken")
    compile_blocks(backbone.blocks, read_inside=False, compiler="broken")
    with pytest.raises(BackboneError, match=r"no C compiler.*--no-compile"), compile_errors():
        tapped(backbone, ["single.0"])


def test_float8_and_compilation_do_not_go_together() -> None:
    with pytest.raises(ConfigError, match="leave out --compile"):
        ExtractConfig(quantisation="float8", compile=True)


@pytest.mark.slow
@pytest.mark.parametrize("concepts", [{"two": ("near", "far")}, {}])
def test_compiled_and_plain_features_agree(
    config: ExtractConfig, concepts: dict[str, tuple[str, ...]]
) -> None:
    planned = plan(replace(config, concepts=concepts, compile=False))
    loaded = load_batch(planned, "val", range(2))
    samples = [sample for sample in loaded if isinstance(sample, PreparedSample)]
    plain, compiled = (
        load_extractor(replace(planned.config, compile=flag), planned.backbone).capture(samples)
        for flag in (False, True)
    )
    pairs = [(plain.hidden_states, compiled.hidden_states)]
    pairs += [(plain.concept_scores[name], compiled.concept_scores[name]) for name in concepts]
    for expected, got in pairs:
        assert (got - expected).norm() <= TOLERANCE * expected.norm()
