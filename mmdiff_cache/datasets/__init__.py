"""Data sets: where samples come from, and how they reach network size."""
