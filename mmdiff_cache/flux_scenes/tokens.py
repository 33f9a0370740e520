"""Tokenizers for a closed vocabulary: one token a known word, letters for any other, all of it made offline.

Both are the classes that FLUX.1 uses (T5: Unigram, CLIP: byte-level BPE): the pipeline needs no code of ours.
"""

import string
from collections import Counter
from itertools import pairwise
from typing import cast

from transformers.models.clip.tokenization_clip import CLIPTokenizer
from transformers.models.t5.tokenization_t5 import T5Tokenizer

WORD_START = "▁"
WORD_END = "</w>"
_LETTERS = string.ascii_letters + string.digits + string.punctuation
_WORD_SCORE, _LETTER_SCORE = -2.0, -20.0  # log-probabilities: a whole word always beats its letters


def t5_tokenizer(words: tuple[str, ...], max_length: int) -> T5Tokenizer:
    """Unigram tokenizer with one piece a word and one a capitalised word; unknown words fall into letters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), (WORD_START, _LETTER_SCORE)]
    pieces += [
        (WORD_START + word, _WORD_SCORE) for word in dict.fromkeys((*words, *map(str.capitalize, words)))
    ]
    pieces += [(letter, _LETTER_SCORE) for letter in _LETTERS]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=max_length)


def clip_tokenizer(words: tuple[str, ...], max_length: int) -> CLIPTokenizer:
    """BPE tokenizer whose merges were learnt until every word is one token; others fall into pieces."""
    merges = byte_pairs(words)
    alphabet = sorted({*string.ascii_lowercase, *string.digits, *string.punctuation})
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *alphabet, *(letter + WORD_END for letter in alphabet)]
    vocabulary += dict.fromkeys(left + right for left, right in merges)
    ids = {piece: number for number, piece in enumerate(dict.fromkeys(vocabulary))}
    return CLIPTokenizer(vocab=ids, merges=cast(list[str], merges), model_max_length=max_length)


def byte_pairs(words: tuple[str, ...]) -> list[tuple[str, str]]:
    """Merges of byte-pair encoding, most frequent pair first, until each of the words is one piece.

    Encoding replays the same merges in the same order, so each word ends as the one piece it ended as here.
    """
    spelled = [[*word[:-1], word[-1] + WORD_END] for word in sorted(set(words))]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for pieces in spelled for pair in pairwise(pieces)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spelled = [_merge(pieces, best) for pieces in spelled]
    return merges


def _merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged
