"""Stage two's networks: token aggregation, decoders, and the model that joins them."""
