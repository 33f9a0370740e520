"""Many trainings that read the store as if they were one, and their results side by side.

from mmdiff_cache.sweeps import compare, sweep
"""

from mmdiff_cache.sweeps.compare import compare
from mmdiff_cache.sweeps.run import sweep

__all__ = ["compare", "sweep"]
