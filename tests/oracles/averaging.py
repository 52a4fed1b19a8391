"""Independent NumPy reference for federated averaging with clipping (float64, plain loops, no autodiff).

Written from the formulas alone, with ``models.py``, ``optimisers.py`` and ``trees.py``, so that it can disagree with the
library:
  * FedAvg / FedSGD: McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data",
    Algorithm 1;
  * server optimisers on the pseudo-gradient: Reddi et al. 2021, "Adaptive Federated Optimization", Algorithms 1 and 2;
  * update clipping: McMahan et al. 2018, "Learning Differentially Private Recurrent Language Models" (flat clipping);
  * optimiser constants and the places of eps: those of optax 0.2.8.

Parameters, gradients and deltas are flat dicts {name: float64 array}.  A batch is (x, y, weights); weights None = ones.

Conventions where the formulas leave a choice:
  * an example of weight 0 does not exist: its row is never read, so a NaN there does no harm;
  * a batch of total weight 0 takes no step (no loss, no momentum, no weight decay);
  * a client of total weight 0 is neither counted nor dropped: it has no say under either weighting;
  * a clip fires when norm > c (or some |g_j| > value), strictly;
  * finiteness is judged on the delta as the client made it, before the update clip;
  * a round with no counted client has aggregate 0, and the server optimiser still steps on it (its momentum moves on),
    unless empty_round="skip"; its loss and fractions are 0/0 and reported as nan.
"""

import numpy as np
from oracles.optimisers import tx_init, tx_update
from oracles.trees import add, all_finite, as64, clip_to_norm, global_norm, scale, sub, zeros_like


def _new_stats():
    return {"loss_sum": 0.0, "weight_sum": 0.0, "steps": 0, "clipped": 0, "examples": 0}


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def local_update(params, batches, model, tx):
    """ClientUpdate of Algorithm 1: one optimiser step per batch from x; (delta = y - x, stats)."""
    x = as64(params)
    y = as64(params)
    state = tx_init(tx, y)
    stats = _new_stats()
    for bx, by, bw in batches:
        loss_sum, grad_sum, weight_sum, count = model.sums(y, bx, by, bw)
        if weight_sum == 0.0:
            continue
        g = scale(1.0 / weight_sum, grad_sum)
        u, state, fired = tx_update(tx, g, state, y)
        y = add(y, u)
        stats["loss_sum"] += loss_sum
        stats["weight_sum"] += weight_sum
        stats["examples"] += count
        stats["steps"] += 1
        stats["clipped"] += int(fired)
    return sub(y, x), stats


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def fedsgd_update(params, batches, model, tx):
    """FedSGD (E = 1, B = infinity): the mean gradient of all the client's examples at x, then one optimiser step."""
    x = as64(params)
    stats = _new_stats()
    total = zeros_like(x)
    for bx, by, bw in batches:
        loss_sum, grad_sum, weight_sum, count = model.sums(x, bx, by, bw)
        total = add(total, grad_sum)
        stats["loss_sum"] += loss_sum
        stats["weight_sum"] += weight_sum
        stats["examples"] += count
    if stats["weight_sum"] == 0.0:
        return zeros_like(x), stats
    g = scale(1.0 / stats["weight_sum"], total)
    delta, _, fired = tx_update(tx, g, tx_init(tx, x), x)
    stats["steps"] = 1
    stats["clipped"] = int(fired)
    return delta, stats


CLIENT_UPDATES = {"fedavg": local_update, "fedsgd": fedsgd_update}


def _ratio(a, b):
    return a / b if b else float("nan")


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def aggregate(deltas, stats, weighting="examples", update_clip=None):
    """(aggregate, metrics): sum_i w_i clip(delta_i) / sum_i w_i over the clients whose delta is finite.

    weighting="examples": w_i = stats_i["weight_sum"] (over the batches given, so epochs repeat in it); "uniform": 1.
    """
    if weighting not in ("examples", "uniform"):
        raise ValueError(f"weighting {weighting!r}")
    total, total_weight = zeros_like(deltas[0]), 0.0
    sums = _new_stats()
    clients = dropped = clipped_updates = 0
    for delta, s in zip(deltas, stats, strict=True):
        if s["weight_sum"] == 0.0:
            continue
        if not all_finite(delta):
            dropped += 1
            continue
        if update_clip is not None:
            delta, fired = clip_to_norm(delta, update_clip)
            clipped_updates += int(fired)
        w = s["weight_sum"] if weighting == "examples" else 1.0
        total = add(total, scale(w, delta))
        total_weight += w
        clients += 1
        for k in sums:
            sums[k] += s[k]
    mean = scale(1.0 / total_weight, total) if total_weight else total
    metrics = {
        "loss": _ratio(sums["loss_sum"], sums["weight_sum"]),
        "examples": sums["examples"],
        "steps": sums["steps"],
        "clients": clients,
        "dropped": dropped,
        "update_norm": global_norm(mean),
        "clipped_steps": _ratio(sums["clipped"], sums["steps"]),
        "clipped_updates": _ratio(clipped_updates, clients),
    }
    return mean, metrics


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def fedavg_rounds(
    params,
    rounds_of_cohorts,
    model,
    client_tx_factory,
    server_tx,
    weighting="examples",
    update_clip=None,
    algorithm="fedavg",
    empty_round="step",
):
    """Algorithm 1's server loop with a server optimiser: (params, [metrics of each round]).

    rounds_of_cohorts[t][i] is the list of batches of the i-th client of round t.  client_tx_factory() gives the client
    chain, fresh for each client; the state of server_tx lives through all the rounds.
    """
    client_update = CLIENT_UPDATES[algorithm]
    if empty_round not in ("step", "skip"):
        raise ValueError(f"empty_round {empty_round!r}")
    x = as64(params)
    server_state = tx_init(server_tx, x)
    history = []
    for cohort in rounds_of_cohorts:
        deltas, stats = [zeros_like(x)], [_new_stats()]  # a weightless client, so that a cohort may be empty
        for batches in cohort:
            delta, s = client_update(x, batches, model, client_tx_factory())
            deltas.append(delta)
            stats.append(s)
        mean, metrics = aggregate(deltas, stats, weighting, update_clip)
        if metrics["clients"] > 0 or empty_round == "step":
            pseudo_gradient = scale(-1.0, mean)
            u, server_state, _ = tx_update(server_tx, pseudo_gradient, server_state, x)
            x = add(x, u)
        history.append(metrics)
    return x, history


def pool(cohort):
    """All the batches of all the clients of a cohort as one (x, y, weights)."""
    batches = [b for client in cohort for b in client]
    xs = np.concatenate([np.asarray(x, np.float64) for x, _, _ in batches])
    ys = np.concatenate([np.asarray(y) for _, y, _ in batches])
    ws = np.concatenate([np.ones(len(x)) if w is None else np.asarray(w, np.float64) for x, _, w in batches])
    return xs, ys, ws


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def gradient_descent(params, x, y, model, lr, steps, clip=None, weights=None):
    """params after `steps` of params -= lr * g, g the gradient of the pooled mean loss, clipped to norm `clip`."""
    p = as64(params)
    for _ in range(steps):
        g = model.grad(p, x, y, weights)
        if clip is not None:
            g, _ = clip_to_norm(g, clip)
        p = sub(p, scale(lr, g))
    return p
