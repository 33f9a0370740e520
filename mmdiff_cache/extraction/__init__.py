"""Stage one: from pictures to a store of features."""
