"""Prompts for pictures that have none: a vision-language model describes them once, into a file."""
