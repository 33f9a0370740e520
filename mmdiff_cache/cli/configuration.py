"""One configuration out of four places, the later wins: defaults, `--config FILE`, flags, `--set`."""

import importlib.util
import json
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from traceback import extract_tb
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from mmdiff_cache.config import Config, TrainConfig
from mmdiff_cache.datasets.concepts import PRESETS
from mmdiff_cache.errors import ConfigError, MMDiffError

if TYPE_CHECKING:
    from mmdiff_cache.experiments.table import Table
    from mmdiff_cache.experiments.world import World

C = TypeVar("C", bound=Config)


def compose(
    kind: type[C], verb: str, file: Path | None, flags: Mapping[str, Any], assignments: Sequence[str]
) -> C:
    """Build a configuration. `verb` is the recipe's function (`extract`, `train`); flags that are None do not
    count.

    Raises ConfigError for a file, field or value that does not fit.
    """
    values = {} if file is None else read_file(kind, verb, file).to_json()
    values |= {name: value for name, value in flags.items() if value is not None}
    return kind.from_json(values).override(parse_assignments(assignments))


def read_file(kind: type[C], verb: str, file: Path) -> C:
    """The configuration that a recipe's function returns, or that an earlier run wrote as JSON."""
    if not file.is_file():
        raise ConfigError(f"--config needs a recipe (.py) or a config.json, and {file} is not a file")
    if file.suffix == ".py":
        return _from_recipe(kind, verb, file)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file} must hold one JSON object with the fields of {kind.__name__}")
    return kind.from_json(values)


def read_sweep(file: Path, assignments: Sequence[str]) -> list[TrainConfig]:
    """What a recipe's `sweep()` returns, with the assignments applied to each.

    Raises ConfigError for a file that is no recipe, or returns something else than training configurations.
    """
    if not file.is_file() or file.suffix != ".py":
        raise ConfigError(f"--config needs a recipe (.py) with a function sweep(), got {file}")
    configs = _call(file, "sweep", "list of TrainConfig")
    if not isinstance(configs, (list, tuple)) or not all(isinstance(c, TrainConfig) for c in configs):
        raise ConfigError(f"sweep() in {file} must return a list of TrainConfig, it returned {configs!r:.80}")
    chosen = parse_assignments(assignments)
    return [config.override(chosen) for config in configs]


def read_table(file: Path, world: "World") -> "Table":
    """What a recipe's `table(world)` returns. Raises ConfigError for a file that is no such recipe."""
    from mmdiff_cache.experiments.table import Table

    if not file.is_file() or file.suffix != ".py":
        raise ConfigError(f"table needs a recipe (.py) with a function table(world), got {file}")
    table = _call(file, "table", "Table", world)
    if not isinstance(table, Table):
        raise ConfigError(f"table() in {file} must return a Table, it returned {type(table).__name__}")
    return table


def _call(file: Path, verb: str, wanted: str, *arguments: Any) -> Any:
    function = getattr(_load(file), verb, None)
    if not callable(function):
        raise ConfigError(
            f"{file} has no function {verb}(); a recipe for '{verb}' returns a {wanted} from it"
        )
    with _a_recipes_own_fault(file):
        return function(*arguments)


def _from_recipe(kind: type[C], verb: str, file: Path) -> C:
    config = _call(file, verb, kind.__name__)
    if not isinstance(config, kind):
        raise ConfigError(
            f"{verb}() in {file} must return a {kind.__name__}, it returned {type(config).__name__}"
        )
    return config


def _load(file: Path) -> ModuleType:
    """Run a recipe as a module of its own."""
    spec = importlib.util.spec_from_file_location(f"recipe_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _a_recipes_own_fault(file):
        spec.loader.exec_module(module)
    return module


@contextmanager
def _a_recipes_own_fault(file: Path) -> Generator[None]:
    """What goes wrong in a recipe as one line that says where."""
    try:
        yield
    except MMDiffError:
        raise
    except Exception as error:
        lines = [one.lineno for one in extract_tb(error.__traceback__) if Path(one.filename) == file]
        where = f", line {lines[-1]}" if lines else ""
        raise ConfigError(f"{file}{where} cannot be run: {type(error).__name__}: {error}") from error


def parse_assignments(assignments: Sequence[str]) -> dict[str, str]:
    """`--set key.of.json=value` into a mapping."""
    pairs = [assignment.partition("=") for assignment in assignments]
    for (key, equals, _), assignment in zip(pairs, assignments, strict=True):
        if not key or not equals:
            raise ConfigError(
                f"--set needs KEY=VALUE such as aggregator.layer_scale=1e-4, got {assignment!r}"
            )
    return {key.strip(): value.strip() for key, _, value in pairs}


def parse_list(text: str | None) -> list[str] | None:
    """`single.4,single.15` into its parts; None stays None."""
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def parse_numbers(option: str, text: str | None) -> list[float] | None:
    """`0.78,0.26` into numbers; None stays None."""
    try:
        return None if text is None else [float(part) for part in parse_list(text) or []]
    except ValueError:
        raise ConfigError(
            f"{option} needs numbers separated by commas such as 0.78,0.26, got {text!r}"
        ) from None


def parse_vocabularies(options: Sequence[str] | None) -> dict[str, list[str]] | None:
    """`name=word,word` options, or names of presets, into vocabularies.

    `none` alone means no vocabulary, no option the default ones.
    """
    if not options:
        return None
    if list(options) == ["none"]:
        return {}
    vocabularies: dict[str, list[str]] = {}
    for option in options:
        name, equals, words = option.partition("=")
        if not name.strip() or not (equals or name in PRESETS):
            raise ConfigError(
                f"--concepts needs NAME=WORD,WORD,..., one of {', '.join(PRESETS)}, or none; got {option!r}"
            )
        if name.strip() in vocabularies:
            raise ConfigError(f"--concepts gives {name.strip()!r} twice; every vocabulary needs its own name")
        vocabularies[name.strip()] = parse_list(words) or [] if equals else list(PRESETS[name])
    return vocabularies


def parse_named(option: str, values: Sequence[str] | None) -> dict[str, str]:
    """`name=value` options, such as folders by data set, into a mapping."""
    pairs = [value.partition("=") for value in values or []]
    for (name, equals, text), value in zip(pairs, values or [], strict=True):
        if not name or not equals or not text:
            raise ConfigError(f"{option} needs NAME=VALUE such as voc=~/data/VOC, got {value!r}")
    return {name: text for name, _, text in pairs}


def parse_seeds(text: str | None) -> list[int] | None:
    """`0,1,2` into whole numbers; None stays None."""
    seeds = parse_list(text)
    if seeds is not None and (not seeds or not all(seed.isdecimal() for seed in seeds)):
        raise ConfigError(f"--seeds needs whole numbers separated by commas such as 0,1,2, got {text!r}")
    return None if seeds is None else [int(seed) for seed in dict.fromkeys(seeds)]
