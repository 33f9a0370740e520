"""The checker that every test runs under: argument types, and the shapes that annotations name."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as for static checkers
