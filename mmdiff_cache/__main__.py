"""`python -m mmdiff_cache` is the command `mmdiff-cache`."""

from .cli import main

if __name__ == "__main__":
    main()
