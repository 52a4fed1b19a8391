"""Federated LoRA in plain NumPy, float64: a slow oracle, written from the papers' formulas and from no other code.

The model is softmax regression with a frozen base: logits = x @ (W + s * A @ B) + c. W is [m, n], c is [n],
A is [m, r], B is [r, n] and s = alpha / r. The papers write W0 + B A with column vectors. Our A is the transpose of
their A (it meets the input first) and our B is the transpose of their B, so their product B A is our A B, transposed.

A batch is a list of (x, y, w). A cohort is one round: {client: (weight, [batches])}. Client i counts for
p_i = weight_i / sum weight; equal weights give the papers' plain mean 1/K. The formulas are from memory: equation
numbers are left out, because we are not sure of them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

Array = np.ndarray
Batch = Sequence[tuple[Array, int, float]]
Cohort = Mapping[int, tuple[float, Sequence[Batch]]]
Cohorts = Sequence[Cohort]
ByClient = dict[int, Array]


def float64(*arrays: Array) -> tuple[Array, ...]:
    """Copies arrays as float64, so that no caller's array changes."""
    return tuple(np.array(a, dtype=np.float64) for a in arrays)


def log_softmax(z: Array) -> Array:
    """Subtracts the log of the sum of exponentials, with the maximum taken out first."""
    z = z - z.max()
    return z - np.log(np.exp(z).sum())


def loss(W: Array, c: Array, A: Array, B: Array, s: float, batch: Batch) -> float:
    """Computes sum_i w_i CE_i / sum_i w_i. Padding has weight 0 and is skipped."""
    total = weights = 0.0
    for x, y, w in batch:
        if w != 0:
            total -= float(w) * log_softmax(np.asarray(x, np.float64) @ (W + s * (A @ B)) + c)[y]
            weights += float(w)
    return float(total / weights)


def gradients(W: Array, c: Array, A: Array, B: Array, s: float, batch: Batch) -> tuple[Array, Array]:
    """Computes dL/dA = s G B^T and dL/dB = s A^T G, where G = sum_i w_i x_i (softmax_i - onehot_i)^T / sum_i w_i."""
    G, weights = np.zeros(W.shape), 0.0
    for x, y, w in batch:
        if w != 0:
            x = np.asarray(x, np.float64)
            d = np.exp(log_softmax(x @ (W + s * (A @ B)) + c))
            d[y] -= 1.0
            G += float(w) * np.outer(x, d)
            weights += float(w)
    G /= weights
    return s * G @ B.T, s * A.T @ G


def local(
    W: Array,
    c: Array,
    A: Array,
    B: Array,
    s: float,
    batches: Iterable[Batch],
    lr: float,
    train: Sequence[str] = ("a", "b"),
) -> tuple[Array, Array]:
    """Trains one client by plain SGD, one step a batch, in order. `train` names the factors that move.

    LoRA: Hu et al. 2021 (arXiv 2106.09685), h = W0 x + (alpha / r) B A x. Both gradients use the step's first A and B.
    """
    W, c, A, B = float64(W, c, A, B)
    for batch in batches:
        gA, gB = gradients(W, c, A, B, s, batch)
        A = A - lr * gA if "a" in train else A
        B = B - lr * gB if "b" in train else B
    return A, B


def shares(cohort: Cohort) -> dict[int, float]:
    """Returns p_i = weight_i / sum weight of each client of the round."""
    total = sum(float(weight) for weight, _ in cohort.values())
    return {i: float(weight) / total for i, (weight, _) in cohort.items()}


def mean(p: Mapping[int, float], values: Mapping[int, Array]) -> Array:
    """Sums p_i value_i over the round's clients."""
    return np.sum([share * values[i] for i, share in p.items()], axis=0)


def trained(
    W: Array, c: Array, A: Array, B: Array, s: float, cohort: Cohort, lr: float, train: Sequence[str] = ("a", "b")
) -> tuple[ByClient, ByClient]:
    """Trains every client of the round from the same A and B. Returns {client: A_i} and {client: B_i}."""
    pairs = {i: local(W, c, A, B, s, batches, lr, train) for i, (_, batches) in cohort.items()}
    return {i: pair[0] for i, pair in pairs.items()}, {i: pair[1] for i, pair in pairs.items()}


def fedit(W: Array, c: Array, A: Array, B: Array, s: float, cohorts: Cohorts, lr: float) -> tuple[Array, Array]:
    """FedIT, Zhang et al. 2024 (arXiv 2305.05644): FedAvg of A and of B apart, sum p_i A_i and sum p_i B_i."""
    W, c, A, B = float64(W, c, A, B)
    for cohort in cohorts:
        As, Bs = trained(W, c, A, B, s, cohort, lr)
        A, B = mean(shares(cohort), As), mean(shares(cohort), Bs)
    return A, B


def ffa(W: Array, c: Array, A: Array, B: Array, s: float, cohorts: Cohorts, lr: float) -> tuple[Array, Array]:
    """FFA-LoRA, Sun et al. 2024 (arXiv 2403.12313): A stays frozen, B = sum p_i B_i, so the mean product is exact."""
    W, c, A, B = float64(W, c, A, B)
    for cohort in cohorts:
        _, Bs = trained(W, c, A, B, s, cohort, lr, train=("b",))
        B = mean(shares(cohort), Bs)
    return A, B


def fedsa(W: Array, c: Array, A: Array, B: Array, s: float, cohorts: Cohorts, lr: float) -> tuple[Array, ByClient]:
    """FedSA-LoRA, Guo et al. 2024 (arXiv 2410.01463): both factors train, A = sum p_i A_i, each client keeps its B_i.

    A client starts from B the first time, and keeps its B_i while absent. Clients never seen are not in the answer.
    """
    W, c, A, B = float64(W, c, A, B)
    own: ByClient = {}
    for cohort in cohorts:
        As = {}
        for i, (_, batches) in cohort.items():
            As[i], own[i] = local(W, c, A, own.get(i, B), s, batches, lr)
        A = mean(shares(cohort), As)
    return A, own


def fedex(W: Array, c: Array, A: Array, B: Array, s: float, cohorts: Cohorts, lr: float) -> tuple[Array, Array, Array]:
    """FedEx-LoRA, Singhal et al. 2024 (arXiv 2410.09432): averages apart, then adds the residual to the base.

    W += s * (sum p_i A_i B_i - (sum p_i A_i)(sum p_i B_i)). The paper prints 1/k; s is ours.
    """
    W, c, A, B = float64(W, c, A, B)
    for cohort in cohorts:
        p = shares(cohort)
        As, Bs = trained(W, c, A, B, s, cohort, lr)
        A, B = mean(p, As), mean(p, Bs)
        W = W + s * (mean(p, {i: As[i] @ Bs[i] for i in cohort}) - A @ B)
    return W, A, B


def flora(
    W: Array, c: Array, A: Array, B: Array, s: float, cohorts: Cohorts, lr: float, fresh: Callable[[int], Array]
) -> tuple[Array, Array, Array]:
    """FLoRA, Wang et al. 2024 (arXiv 2409.05976): stacks the adapters, so that the product is the sum of the products.

    W += s * [p_1 A_1, p_2 A_2, ...] @ [B_1; B_2; ...]; only one factor carries p_i. Adapters then begin anew: after
    round t (from 0) A = fresh(t + 1) and B = 0. So the state after the last round has B = 0.
    """
    W, c, A, B = float64(W, c, A, B)
    for t, cohort in enumerate(cohorts):
        p = shares(cohort)
        As, Bs = trained(W, c, A, B, s, cohort, lr)
        wide = np.concatenate([p[i] * As[i] for i in cohort], axis=1)
        tall = np.concatenate([Bs[i] for i in cohort], axis=0)
        W = W + s * (wide @ tall)
        (A,) = float64(fresh(t + 1))
        B = np.zeros((A.shape[1], W.shape[1]))
    return W, A, B


def factors(M: Array, rank: int, split: str = "balanced") -> tuple[Array, Array]:
    """Splits the best rank-`rank` approximation of M by SVD. The singular values fall, so slices truncate it further.

    "balanced" gives A = U sqrt(S), B = sqrt(S) V^T. "right" gives A = U, B = S V^T.
    """
    assert 1 <= rank <= min(M.shape)
    assert split in ("balanced", "right")
    U, S, Vt = np.linalg.svd(M, full_matrices=False)
    U, S, Vt = U[:, :rank], S[:rank], Vt[:rank]
    if split == "balanced":
        return U * np.sqrt(S), np.sqrt(S)[:, None] * Vt
    return U, S[:, None] * Vt


def flexlora(
    W: Array,
    c: Array,
    A: Array,
    B: Array,
    s: float,
    cohorts: Cohorts,
    lr: float,
    rank: int,
    ranks: Mapping[int, int] | None = None,
    split: str = "balanced",
) -> tuple[Array, Array]:
    """FlexLoRA, Bai et al. 2024 (arXiv 2402.11505): averages the products, M = sum p_i A_i B_i, and truncates by SVD.

    Client i of rank ranks[i] trains the first ranks[i] columns of A and rows of B: from round 1 on that is the best
    truncation of the server's product, in round 0 it is a slice of the given factors. A client that ranks does not
    name trains all of A and B. One s serves every rank. We recall the paper's split as "right", but are not sure.
    """
    # A and B are unique only up to the signs of singular vectors, but local SGD is equivariant to them, and to any
    # orthogonal Q: at (A Q, Q^T B) the gradients are (gA Q, Q^T gB). Checked once: random sign flips after every SVD
    # leave the product after 3 rounds exactly equal, a random Q leaves a local product equal within 1e-15. So A B is
    # unique if the singular values differ where a truncation cuts. "right" also needs M to have rank `rank`: otherwise
    # SVD picks the last columns of U freely, and a B of zeros then trains on them. "balanced" has zeros in both there,
    # up to the square root of rounding, and such a direction stays dead.
    W, c, A, B = float64(W, c, A, B)
    for cohort in cohorts:
        p, products = shares(cohort), {}
        for i, (_, batches) in cohort.items():
            r = A.shape[1] if ranks is None else ranks.get(i, A.shape[1])
            assert 1 <= r <= A.shape[1], f"client {i} has rank {r}, but the server has rank {A.shape[1]}"
            Ai, Bi = local(W, c, A[:, :r], B[:r], s, batches, lr)
            products[i] = Ai @ Bi
        A, B = factors(mean(p, products), rank, split)
    return A, B


def flexlora_product(
    W: Array,
    c: Array,
    A: Array,
    B: Array,
    s: float,
    cohorts: Cohorts,
    lr: float,
    rank: int,
    ranks: Mapping[int, int] | None = None,
    split: str = "balanced",
) -> Array:
    """Returns FlexLoRA's A B after all rounds: the part that singular vectors' signs do not change."""
    return np.matmul(*flexlora(W, c, A, B, s, cohorts, lr, rank, ranks, split))
