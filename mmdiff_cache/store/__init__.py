"""The store of features: what it holds, how it is written, read, checked and summarised."""
