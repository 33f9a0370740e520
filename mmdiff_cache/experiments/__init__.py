"""The paper's tables: what their rows train, in which world, what comes of it, and which claims it tests.

from mmdiff_cache.experiments import Claim, Row, Table, World
"""

from mmdiff_cache.experiments.table import Claim, Row, Table, Training
from mmdiff_cache.experiments.world import World

__all__ = ["Claim", "Row", "Table", "Training", "World"]
