"""How sure is a difference? Tests and confidence intervals of what `validate` measures.

Of accuracy: both models answer the same images, so only those count that one of them alone gets right. Of
latency: nothing is assumed of how times are distributed, but that rounds are independent of one another.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist

Interval = tuple[float, float]


def mcnemar_p_value(lost: int, won: int) -> float:
    """Returns the p-value of McNemar's exact test, two-sided: that losses and wins are equally likely.

    Under that, the losses among n = lost + won images are Binomial(n, ½); the p-value is twice the smaller
    tail, at most 1.

    Source: McNemar, Psychometrika 12 (1947) 153–157; exact form in Fagerland, Lydersen and Laake, BMC Medical
    Research Methodology 13 (2013) 91.
    """
    changed, ways, tail = lost + won, 1, 0  # whole numbers: C(n, k) is beyond floats
    for k in range(min(lost, won) + 1):
        tail += ways
        ways = ways * (changed - k) // (k + 1)  # C(n, k + 1)
    return min(1.0, 2 * tail / (1 << changed))


def drop_interval(lost: int, won: int, total: int, confidence: float) -> Interval:
    """Returns the confidence interval of the drop (lost - won) / total of paired proportions, in [-1, 1].

    With p = (lost + 1) / (total + 2) and q = (won + 1) / (total + 2) it is p - q ± z·√((p + q - (p - q)²) /
    (total + 2)), z the normal quantile: Wald's interval with one image more of each kind. Without a single
    change it is about ± 2.8 / total at 95 %.

    Source: Bonett and Price, Journal of Educational and Behavioral Statistics 37 (2012) 479–488, recommended
    by Fagerland, Lydersen and Laake, Statistics in Medicine 33 (2014) 2850–2875.
    """
    p, q = (lost + 1) / (total + 2), (won + 1) / (total + 2)
    half = _quantile(confidence) * math.sqrt((p + q - (p - q) ** 2) / (total + 2))
    return max(-1.0, p - q - half), min(1.0, p - q + half)


def share_interval(count: int, total: int, confidence: float) -> Interval:
    """Returns Wilson's score interval of a share count / total, in [0, 1].

    Source: Wilson, Journal of the American Statistical Association 22 (1927) 209–212.
    """
    z2 = _quantile(confidence) ** 2
    centre = (count + z2 / 2) / (total + z2)
    half = math.sqrt(z2 * (count * (total - count) / total + z2 / 4)) / (total + z2)
    return max(0.0, centre - half), min(1.0, centre + half)


def median_interval(samples: Sequence[float], confidence: float) -> Interval | None:
    """Returns the distribution-free confidence interval of the median: two of the sorted samples.

    The number of samples below the median is B ~ Binomial(n, ½), so it lies between the k-th smallest and
    the k-th largest sample with probability 1 - 2·P(B < k), or more where samples are equal. k is the largest
    that keeps the confidence; None where even the whole range does not: 95 % takes 6 samples, 98 % 7.

    Source: Conover, Practical Nonparametric Statistics, 3rd edition (1999), section 3.2; Thompson, Annals of
    Mathematical Statistics 7 (1936) 122–128.
    """
    n, ways, below, k = len(samples), 1, 1, 0
    while 2 * below / (1 << n) <= 1 - confidence:  # below / 2^n = P(B < k + 1)
        k += 1
        ways = ways * (n - k + 1) // k
        below += ways
    if k == 0:
        return None
    ordered = sorted(samples)
    return ordered[k - 1], ordered[n - k]


def _quantile(confidence: float) -> float:
    """Returns z, so that a standard normal lies in [-z, z] with this probability."""
    return NormalDist().inv_cdf((1 + confidence) / 2)
