"""NumPy oracle of federated DoRA: Liu et al. 2024, DoRA: Weight-Decomposed Low-Rank Adaptation, arXiv 2402.09353.

Softmax regression with logits x W' + c: W [d, k] and c [k] frozen; A [d, r], B [r, k] and m [k] trained. A column of
the matrix is one output unit. The paper's equation (5), with LoRA's factor `scale`, its B and A here A and B:

    W'_j = m_j V_j / n_j, V = W + scale A B, n_j = ||V_j||_2.

The gradients are those of section 4.3, n held constant: equation (11), dL/dV_j = (m_j / n_j) dL/dW'_j, in the place
of (6); and equation (7), dL/dm_j = <dL/dW'_j, V_j> / n_j. The numbers of the equations are recalled. The federated
part is not the paper's: local SGD from the server's A, B, m, then the weighted mean of each of them apart.
"""

import numpy as np


def _direction(W, A, B, scale):
    """V = W + scale A B, and the norms n of its columns."""
    V = W + scale * (A @ B)
    return V, np.sqrt(np.sum(V**2, axis=0))


def merged(W, A, B, m, scale):
    """W', the matrix in use: column j is m_j V_j / n_j, equation (5)."""
    V, n = _direction(*(np.asarray(u, dtype=np.float64) for u in (W, A, B)), scale)
    return V * (np.asarray(m, dtype=np.float64) / n)


def _gradients(W, c, A, B, m, scale, batch):
    """dL/dA, dL/dB, dL/dm of the batch's mean cross-entropy, n constant: equations (11) and (7)."""
    X = np.array([np.ravel(x) for x, _ in batch], dtype=np.float64)
    y = np.array([int(label) for _, label in batch])
    V, n = _direction(W, A, B, scale)
    logits = X @ (V * (m / n)) + c
    error = np.exp(logits - logits.max(axis=1, keepdims=True))
    error /= error.sum(axis=1, keepdims=True)
    error[np.arange(len(y)), y] -= 1.0
    dW = X.T @ error / len(y)
    dV = dW * (m / n)
    return scale * dV @ B.T, scale * A.T @ dV, np.sum(dW * V, axis=0) / n


def _client(W, c, A, B, m, scale, batches, lr):
    """One SGD step a batch, from the server's A, B, m."""
    for batch in batches:
        dA, dB, dm = _gradients(W, c, A, B, m, scale, batch)
        A, B, m = A - lr * dA, B - lr * dB, m - lr * dm
    return A, B, m


def dora(W, c, A, B, m, scale, cohorts, lr):
    """A, B, m after the rounds of {client id: (weight, batches)}, a batch a list of (x, y); {} changes nothing."""
    W, c, A, B, m = (np.asarray(u, dtype=np.float64) for u in (W, c, A, B, m))
    for cohort in cohorts:
        if not cohort:
            continue
        total = sum(weight for weight, _ in cohort.values())
        results = [(weight / total, _client(W, c, A, B, m, scale, b, lr)) for weight, b in cohort.values()]
        A, B, m = (sum(p * parts[i] for p, parts in results) for i in range(3))
    return A, B, m
