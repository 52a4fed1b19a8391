"""FedAvg beside FedBN on digits whose features shift from client to client, for ``docs/frameworks.md``.

Each client sees its digits through a scale and an offset of its own, ``a x + b`` with ``a`` in [0.3, 3] and ``b`` in
[-2, 2]. A layer of 32 units with batch normalisation, or with group normalisation. Each method gets three learning
rates on a seed of its own, chosen by the accuracy on held-out examples of the clients, then three other seeds.

  python benchmarks/batch_norm.py         prints the table
"""

import flax.linen as nn
import jax
import numpy as np
import optax

import fedjax_clip as fc

SEEDS, TUNING_SEED, RATES = (0, 1, 2), 100, (0.03, 0.1, 0.3)
ROUNDS, COHORT, BATCH = 60, 8, 16
METHODS = ("group norm, FedAvg", "batch norm, FedAvg", "batch norm, FedBN", "batch norm, own statistics")


class Net(nn.Module):
    """A hidden layer, normalised."""

    norm: str

    @nn.compact
    def __call__(self, x, weights=None):
        x = nn.Dense(32, use_bias=False)(x.reshape(-1, 64))
        x = fc.models.BatchNorm()(x, weights) if self.norm == "batch" else nn.GroupNorm(4)(x)
        return nn.Dense(10)(nn.relu(x))


def populations(seed: int) -> tuple[fc.FederatedData, fc.FederatedData]:
    """Training clients, and held-out examples of the same clients."""
    whole = fc.data.partition.iid(fc.data.sources.digits().examples, 30, seed)
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(30), whole.sizes)
    scale, offset = np.exp(rng.uniform(np.log(0.3), np.log(3), 30)), rng.uniform(-2, 2, (30, 64))
    x = whole.examples["x"].reshape(-1, 64) * scale[owner, None] + offset[owner]
    shifted = fc.FederatedData({"x": x.astype(np.float32), "y": whole.examples["y"]}, whole.offsets)
    return shifted.split_examples(0.25, seed)


def accuracy(method: str, clip: bool, rate: float, seed: int) -> tuple[float, float]:
    """On held-out examples, and the mean over the worst tenth of the clients."""
    data, held_out = populations(seed)
    model = Net(method.split()[0])
    loss = (fc.tasks.classifier_with_state if model.norm == "batch" else fc.tasks.classifier)(model)
    client_tx = optax.chain(fc.clipping.clip_by_global_norm(1.0), optax.sgd(rate)) if clip else optax.sgd(rate)
    algorithm = fc.fedavg(loss, client_tx)
    if method.endswith("FedBN"):
        algorithm = fc.partially_private(algorithm, "BatchNorm")
    if method.endswith("own statistics"):
        algorithm = fc.partially_private(algorithm, "^batch_stats/")
    evaluate = fc.evaluator(loss, {"held out": held_out}, algorithm=algorithm, population=data)
    params = jax.tree.map(np.asarray, model.init(jax.random.key(seed), np.zeros((1, 64))))
    how = {"rounds": ROUNDS, "cohort_size": COHORT, "batch_size": BATCH, "local_epochs": 2, "seed": seed}
    result = fc.train(algorithm, data, params, **how)
    each = np.sort(evaluate.per_client(result.params, result.state.clients)["held out/accuracy"])
    return evaluate(result.params, result.state.clients)["held out/accuracy"], each[: max(1, len(each) // 10)].mean()


def main() -> None:
    print("| method | clip | rate | accuracy | worst tenth |\n|---|---|---|---|---|")
    for method in METHODS:
        for clip in (False, True):
            rate = max(RATES, key=lambda rate: accuracy(method, clip, rate, TUNING_SEED)[0])
            found = 100 * np.array([accuracy(method, clip, rate, seed) for seed in SEEDS])
            mean, spread = found.mean(0), found.std(0, ddof=1)
            cells = (f"{m:.1f} ± {s:.1f}" for m, s in zip(mean, spread))
            print(f"| {method} | {'1.0' if clip else 'none'} | {rate} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
