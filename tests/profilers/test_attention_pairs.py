from __future__ import annotations

import itertools

import torch

from profilers.attention_pairs import causal_pairs, upper_left_causal_pairs


def _visible(queries, keys, window):
    position = keys - queries
    return sum(
        1
        for i, j in itertools.product(range(queries), range(keys))
        if j <= position + i and (window is None or j > position + i - window)
    )


def test_causal_pairs_match_the_mask_drawn_out():
    for queries, keys, window in itertools.product(range(1, 8), range(1, 11), [None, *range(1, 13)]):
        assert causal_pairs(queries, keys, window) == _visible(queries, keys, window), (queries, keys, window)


def test_upper_left_causal_pairs_match_torchs_own_mask():
    for queries, keys in itertools.product(range(1, 8), repeat=2):
        value = torch.eye(keys)[None, None]
        weights = torch.nn.functional.scaled_dot_product_attention(
            torch.zeros(1, 1, queries, 4), torch.zeros(1, 1, keys, 4), value, is_causal=True
        )
        assert upper_left_causal_pairs(queries, keys) == int((weights > 0).sum())
