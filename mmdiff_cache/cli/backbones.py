"""`mmdiff-cache backbones`: which there are, and what can be read out of each, without reading a weight."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmdiff_cache.cli.console import next_command, out, print_json, safe
from mmdiff_cache.cli.everyday import AsJson

if TYPE_CHECKING:
    from mmdiff_cache.backbones.info import BackboneInfo

SHORT_TEXT = 128
"""Text tokens for which a forward is priced beside the published number: captions are seldom longer."""


def backbones(
    name: Annotated[
        str | None, typer.Argument(help="A name, a pipeline's folder, or org/name on the hub.")
    ] = None,
    resolution: Annotated[int | None, typer.Option(help="Side of the network input in pixels.")] = None,
    as_json: AsJson = False,
) -> None:
    """Without a name: the known backbones. With one: its layers, its tokens, and what a picture costs."""
    from mmdiff_cache.backbones.registry import BACKBONES, describe

    if name is not None:
        _show_one(_facts(describe(name), resolution), as_json)
        return
    known = {entry.summary: describe(entry.name) for entry in BACKBONES.values()}
    if as_json:
        print_json([_facts(info, None) for info in known.values()])
        return
    from mmdiff_cache.cli.tables import new_table

    table = new_table("name", "blocks", "channels", "input", "licence", "what it is")
    for summary, info in known.items():
        shape = info.architecture
        blocks = f"{shape.double_blocks} double, {shape.single_blocks} single"
        cells = (info.name, blocks, str(info.channels), f"{info.resolution} px", info.licence, summary)
        table.add_row(*map(safe, cells))
    out.print(table)
    next_command("mmdiff-cache", "backbones", next(iter(BACKBONES)))


def _show_one(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(facts)
        return
    from mmdiff_cache.backbones.registry import BACKBONES
    from mmdiff_cache.cli.tables import facts_table, show_bytes
    from mmdiff_cache.extraction.cost import show_operations

    words = {
        **{name: show_operations(value) for name, value in facts.items() if name.startswith("operations")},
        "bytes_a_prompt": show_bytes(facts["bytes_a_prompt"]),
        "bytes_a_map": show_bytes(facts["bytes_a_map"]),
        "bytes_a_sample": f"{show_bytes(facts['bytes_a_sample'])} with the default layers and timesteps",
    }
    lists = {name: " ".join(map(str, value)) for name, value in facts.items() if isinstance(value, list)}
    out.print(facts_table({name.replace("_", " "): text for name, text in (facts | lists | words).items()}))
    called = facts["name"] if facts["name"] in BACKBONES else facts["source"]
    extract = ("extract", "--dataset", "images", "--data-root", "DIR", "--backbone", called)
    next_command("mmdiff-cache", *extract)


def _facts(info: "BackboneInfo", resolution: int | None) -> dict[str, Any]:
    """What is said about a backbone, as JSON."""
    from mmdiff_cache.extraction.cost import forward_operations

    side = resolution or info.resolution
    rows, columns = info.token_grid(side)
    one_map = 2 * rows * columns * info.channels
    return {
        "name": info.name,
        "source": info.source,
        "pipeline": info.architecture.pipeline,
        "licence": info.licence,
        "double_blocks": list(info.double_blocks),
        "single_blocks": list(info.single_blocks),
        "default_layers": list(info.layers),
        "default_timesteps": list(info.timesteps),
        "concept_blocks": list(info.concept_blocks),
        "resolution": side,
        "token_grid": [rows, columns],
        "channels": info.channels,
        "text_tokens": info.architecture.clip_tokens + info.text_length,
        "bytes_a_prompt": info.prompt_bytes(info.text_length, info.dtype),
        "guidance": info.guidance,
        "dtype": info.dtype,
        "operations_a_forward": forward_operations(info, side, info.text_length, len(info.blocks)),
        f"operations_a_forward_with_{SHORT_TEXT}_text_tokens": forward_operations(
            info, side, SHORT_TEXT - info.architecture.clip_tokens, len(info.blocks)
        ),
        "bytes_a_map": one_map,
        "bytes_a_sample": one_map * len(info.layers) * len(info.timesteps),
    }
