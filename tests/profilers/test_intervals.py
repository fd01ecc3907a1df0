import itertools
import math
import random

import pytest

from profilers.intervals import block_interval, paired_difference, t_quantile, wilson

# Two-sided 95 % quantiles of Student's t as printed in tables (NIST/SEMATECH e-Handbook, 1.3.6.7.2).
TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 10: 2.228, 15: 2.131, 30: 2.042, 60: 2.000, 100: 1.984}


@pytest.mark.parametrize("degrees", TABLE)
def test_t_quantiles_are_those_of_the_tables(degrees):
    assert t_quantile(0.95, degrees) == pytest.approx(TABLE[degrees], abs=5e-4)


def test_t_quantile_of_one_degree_is_cauchys():
    for confidence in (0.5, 0.9, 0.99):
        assert t_quantile(confidence, 1) == pytest.approx(math.tan(math.pi * confidence / 2), rel=1e-12)


def test_equal_blocks_give_the_textbook_interval():
    means = [1.0, 2.0, 4.0, 5.0]
    mean, interval = block_interval([10 * value for value in means], [10] * 4)
    error = math.sqrt(sum((value - 3.0) ** 2 for value in means) / 3 / 4)
    assert mean == 3.0
    assert interval == pytest.approx((3.0 - 3.182446305 * error, 3.0 + 3.182446305 * error), rel=1e-8)


def test_one_block_has_a_mean_and_no_interval():
    assert block_interval([6.0], [3]) == (2.0, None)


@pytest.mark.parametrize("correlation", [0.0, 0.6])
def test_coverage_of_block_intervals_over_skewed_correlated_tokens(correlation):
    """Tokens: a skewed value each, plus one that stays for a while, as topics do."""
    generator = random.Random(1)
    covered = trials = 0
    for _ in range(600):
        sums = []
        for _ in range(16):
            topic = generator.gauss(0, correlation)
            sums.append(sum(generator.expovariate(0.5) + topic for _ in range(64)))
        _, (low, high) = block_interval(sums, [64] * 16)
        covered += low <= 2.0 <= high
        trials += 1
    assert 0.93 <= covered / trials <= 0.975


def test_wilson_intervals_of_published_cases():
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


def test_paired_difference_covers_by_exact_enumeration():
    """Sum the probability of every table of 30 samples whose interval holds the true difference."""
    samples = 30
    for gain, loss in ((0.1, 0.1), (0.2, 0.05), (0.05, 0.02)):
        covered = 0.0
        for gained, lost in itertools.product(range(samples + 1), repeat=2):
            same = samples - gained - lost
            if same < 0:
                continue
            low, high = paired_difference(gained, lost, samples)
            if low <= gain - loss <= high:
                ways = math.comb(samples, gained) * math.comb(samples - gained, lost)
                covered += ways * gain**gained * loss**lost * (1 - gain - loss) ** same
        assert covered >= 0.94


def test_paired_difference_is_symmetric_and_holds_what_was_seen():
    low, high = paired_difference(7, 3, 100)
    assert (-high, -low) == pytest.approx(paired_difference(3, 7, 100))
    assert low < 0.04 < high
    assert paired_difference(0, 0, 10)[0] < 0 < paired_difference(0, 0, 10)[1]
