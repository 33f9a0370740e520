"""The command line: it parses, calls the ten public names, and prints. `mmdiff-cache --help` loads no numpy
or torch.
"""

from mmdiff_cache.cli.app import main

__all__ = ["main"]
