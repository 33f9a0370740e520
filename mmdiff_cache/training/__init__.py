"""Stage two: training heads from a store alone, and scoring them."""
