"""NumPy oracle of choosing clients: Power-of-Choice, Oort. The random draws are given or left as probabilities. Recalled; Oort's score also seen in code."""

import numpy as np


# Power-of-Choice, the strategy pi_pow-d of Cho, Wang, Joshi 2020.
def power_of_choice(losses, candidates, m):
    """The m of `candidates` with the largest losses [N], by falling loss; a tie goes to the earlier candidate.

    The candidates, d >= m of them, are drawn without replacement with probabilities p_k (shares of the data). Ties are
    open in the paper (random). d = m: the candidates themselves, unbiased sampling.
    """
    order = sorted(range(len(candidates)), key=lambda c: (-losses[candidates[c]], c))
    return [candidates[c] for c in order[:m]]


# Oort's statistical utility, Section 4.2 of Lai, Zhu, Madhyastha, Chowdhury 2021.
def oort_statistical(sample_losses):
    """|B| sqrt(mean of squared sample losses) over the client's samples B of its last round."""
    sample_losses = np.asarray(sample_losses, dtype=float)
    return len(sample_losses) * np.sqrt(np.mean(sample_losses**2))


# Oort, Algorithm 1 (lines of the explored clients) and equation (1).
def oort_utilities(stat, last, rnd, durations=None, preferred=np.inf, alpha=2.0, percentile=0.95, normalise=False):
    """(min(U_i, clip) + sqrt(0.1 log(rnd) / last_i)) * (T / t_i)^alpha where T < t_i, of the explored clients.

    stat: U_i; last: the round of the client's last part, >= 1; rnd: the round now. clip: the sorted U at place
    min(floor(percentile n), n - 1). Open: where it says percentile; the system factor is on the sum (the code), not on U
    alone. normalise: U becomes (U - min) / (max - min) before the sum, the clip's max kept out, as the authors' code
    does but for its 0.999 and 1e-4 (0 where all are equal). durations None: no system factor.
    """
    stat, last = np.asarray(stat, dtype=float), np.asarray(last, dtype=float)
    ranked = np.sort(stat)
    util = np.minimum(stat, ranked[min(int(percentile * len(stat)), len(stat) - 1)])
    if normalise:
        width = ranked[-1] - ranked[0]
        util = (util - ranked[0]) / width if width > 0.0 else np.zeros_like(util)
    util = util + np.sqrt(0.1 * np.log(rnd) / last)
    if durations is not None:
        t = np.asarray(durations, dtype=float)
        util = np.where(preferred < t, util * (preferred / t) ** alpha, util)
    return util


# Oort's rule of exploration, with the values of its evaluation.
def oort_exploration(rnd, first=0.9, decay=0.98, least=0.2):
    """The share of a round's clients taken from those never tried: max(first decay^rnd, least), rnd = 0, 1, ..."""
    return max(first * decay**rnd, least)


# Oort, Algorithm 1: the pool of exploitation.
def oort_pool(utilities, count, confidence=0.95):
    """(ids, probabilities): clients of utility >= confidence times the count-th largest, drawn in proportion to it.

    count = (1 - eps) K; rounding is open. Ids rise.
    """
    utilities = np.asarray(utilities, dtype=float)
    cutoff = confidence * np.sort(utilities)[::-1][min(count, len(utilities)) - 1]
    ids = np.flatnonzero(utilities >= cutoff)
    return ids.tolist(), utilities[ids] / utilities[ids].sum()
