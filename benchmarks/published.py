"""Tables of papers at the papers' own settings, their figures beside those of this library.

  python benchmarks/published.py agnostic                     # minutes
  python benchmarks/published.py label-skew --rounds=50       # hours on a CPU; the paper has 2000 rounds
  python benchmarks/published.py label-skew --split=few-classes --methods=FedAvg,Ditto --seeds=1
  python benchmarks/published.py label-skew --data=cifar100   # from TFDS, prepared on your machine

``agnostic``: three kinds of clothes in Fashion-MNIST, each a client, and a linear model; AFL (Mohri et al. 2019) and
q-FFL (Li et al. 2020, who compare both). ``label-skew``: 20 clients by Dirichlet(0.1) or with a few classes each, and a
CNN (Zhang et al. 2023, "GPFL", Table 1, made with PFLlib). ``--tiny`` runs either on random pictures.
"""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax

import fedjax_clip as fc
from fedjax_clip.core.types import PerExampleLoss

Found = tuple[float, ...]  # accuracies of one seed, in percent


# ------------------------------------------------------------------------------------------------- AFL and q-FFL

CLOTHES = {"shirt": 6, "pullover": 2, "T-shirt": 0}
AGNOSTIC = {  # Li et al. 2020, the table beside AFL: average, then the three kinds
    "q-FFL, q = 0": (78.8, 66.0, 84.5, 85.9),
    "AFL": (77.8, 71.4, 81.0, 82.1),
    "q-FFL, q > 0": (77.8, 74.2, 78.9, 80.4),
}


def clothes(split: str, tiny: bool) -> dict[str, np.ndarray]:
    """Pictures of the three kinds as rows of numbers, with their classes 0, 1 and 2."""
    read = random_pictures(3000, 10) if tiny else fc.data.sources.fashion_mnist(split)
    chosen = np.isin(read["y"], list(CLOTHES.values()))
    kinds = np.array([list(CLOTHES.values()).index(y) for y in read["y"][chosen]], np.int32)
    return {"x": read["x"][chosen].reshape(-1, 784).astype(np.float32), "y": kinds}


def agnostic(options: argparse.Namespace) -> None:
    """The table of AFL and q-FFL."""
    train, test = clothes("train", options.tiny), clothes("test", options.tiny)
    mean, spread = train["x"].mean(0), train["x"].std(0) + 1e-3
    data, held_out = (
        fc.data.partition.natural({"x": (x["x"] - mean) / spread, "y": x["y"], "kind": x["y"]}, by="kind")
        for x in (train, test)
    )
    model, rate, rounds = nn.Dense(3), 0.1, options.rounds or 6000
    loss, client_tx = fc.tasks.classifier(model), optax.sgd(rate)
    methods = {
        "q-FFL, q = 0": fc.fedavg(loss, client_tx, reducer=fc.reduce.uniform_mean()),
        "AFL": fc.fair.afl(loss, client_tx, clients=3, rate=0.1),
        "q-FFL, q = 5": fc.fair.q_ffl(loss, client_tx, q=5.0, rate=rate),
        "q-FFL, q = 15": fc.fair.q_ffl(loss, client_tx, q=15.0, rate=rate),
    }
    evaluate = fc.evaluator(loss, {"test": held_out})

    def one(method: str, seed: int) -> Found:
        iterates = []
        fc.train(
            methods[method],
            data,
            model.init(jax.random.key(seed), np.zeros((1, 784))),
            rounds=rounds,
            batch_size=200,
            local_steps=1,
            seed=seed,
            evaluate=lambda params: iterates.append(params) or {},
            eval_every=10,
        )
        kept = jax.tree.map(lambda *x: np.mean(x, 0), *iterates)  # as AFL, which averages all iterates
        each = np.array(evaluate.per_client(kept)["test/accuracy"])
        return 100 * each.mean(), *(100 * each)

    print(f"{rounds} rounds, {options.seeds} seeds\n")
    print("| method | average | shirt | pullover | T-shirt |\n|---|---|---|---|---|")
    for method in methods:
        print(f"| {method} | {' | '.join(told(one, method, options.seeds))} |", flush=True)
    for method, figures in AGNOSTIC.items():
        print(f"| {method}, paper | {' | '.join(f'{x:.1f}' for x in figures)} |")


# ------------------------------------------------------------------------------------------------------ label skew


class Net(nn.Module):
    """The paper's CNN of four layers."""

    classes: int

    @nn.compact
    def __call__(self, x):
        x = 2 * x - 1
        for width in (32, 64):
            x = fc.models.Conv(width, (5, 5), padding="VALID", activation=nn.relu, max_pool=True)(x)
        x = nn.relu(nn.Dense(512)(x.reshape(x.shape[0], -1)))
        return nn.Dense(self.classes)(x)


@dataclasses.dataclass(frozen=True)
class Pictures:
    """A data set of the table, with the paper's figures of ``METHODS`` by split."""

    read: Callable[[], dict[str, Any]]
    shape: tuple[int, ...]
    classes: int
    few: int  # classes of a client in the split of a few classes
    figures: dict[str, tuple[float, ...]]


def fashion_mnist() -> dict[str, Any]:
    """All 70,000 pictures."""
    both = [fc.data.sources.fashion_mnist(split) for split in ("train", "test")]
    return jax.tree.map(lambda *x: np.concatenate(x), *both)


def cifar100() -> dict[str, Any]:
    """All 60,000 pictures, from TFDS."""
    return fc.data.sources.tfds("cifar100", "train+test", fields=("image", "label"))


METHODS = ("FedAvg", "FedProx", "pFedMe", "Ditto", "FedPer", "FedRep")
SKEWED = {
    "fashion_mnist": Pictures(
        fashion_mnist,
        (28, 28, 1),
        classes=10,
        few=2,
        figures={
            "dirichlet": (85.85, 85.63, 97.25, 97.47, 97.44, 97.56),
            "few-classes": (80.41, 78.08, 99.35, 99.44, 99.47, 99.56),
        },
    ),
    "cifar100": Pictures(
        cifar100,
        (32, 32, 3),
        classes=100,
        few=10,
        figures={
            "dirichlet": (31.89, 31.99, 47.34, 52.87, 49.63, 52.39),
            "few-classes": (25.98, 25.94, 58.20, 67.23, 63.53, 67.56),
        },
    ),
}


def build(method: str, loss: PerExampleLoss, rate: float) -> fc.extend.Algorithm:
    """A method of the table with PFLlib's default numbers."""
    tx, head = optax.sgd(rate), "Dense_1"
    average = fc.fedavg(loss, tx)
    return {
        "FedAvg": lambda: average,
        "FedProx": lambda: fc.fedavg(loss, optax.chain(fc.local.proximal(0.001), tx)),
        "pFedMe": lambda: fc.personal.pfedme(loss, tx, strength=15.0, rate=rate),
        "Ditto": lambda: fc.personal.ditto(loss, tx, strength=1.0),
        "FedPer": lambda: fc.partially_private(average, head),
        "FedRep": lambda: fc.personal.fedrep(loss, tx, head=head),
    }[method]()


def label_skew(options: argparse.Namespace) -> None:
    """The table of personalised methods."""
    pictures, rate, clients = SKEWED[options.data], 0.005, 20
    examples = random_pictures(1000, pictures.classes, pictures.shape) if options.tiny else pictures.read()
    model = Net(pictures.classes)
    loss, rounds = fc.tasks.classifier(model), options.rounds or 2000
    published = dict(zip(METHODS, pictures.figures[options.split], strict=True))
    chosen = options.methods.split(",") if options.methods else METHODS
    if unknown := set(chosen) - set(METHODS):
        raise fc.InvalidInput(f"--methods: there is no {sorted(unknown)[0]!r}; there are {', '.join(METHODS)}")

    def one(method: str, seed: int) -> Found:
        if options.split == "dirichlet":
            whole = fc.data.partition.dirichlet(examples, clients, alpha=0.1, seed=seed)
        else:
            whole = fc.data.partition.shards(examples, clients, pictures.few, seed=seed)
        data, held_out = whole.split_examples(0.25, seed)
        algorithm = build(method, loss, rate)
        result = fc.train(
            algorithm,
            data,
            model.init(jax.random.key(seed), np.zeros((1, *pictures.shape))),
            rounds=rounds,
            batch_size=10,
            seed=seed,
            evaluate=fc.evaluator(loss, {"test": held_out}, algorithm=algorithm, population=data),
            eval_every=max(1, min(10, rounds // 10)),
        )
        return (100 * max(row["eval/test/accuracy"] for row in result.history if "eval/test/accuracy" in row),)

    print(f"{options.data}, {options.split}: {rounds} rounds (the paper: 2000), {options.seeds} seeds\n")
    print("| method | accuracy | paper |\n|---|---|---|")
    for method in chosen:
        print(f"| {method} | {' | '.join(told(one, method, options.seeds))} | {published[method]:.2f} |", flush=True)


# ----------------------------------------------------------------------------------------------------- both of them


def random_pictures(count: int, classes: int, shape: tuple[int, ...] = (28, 28, 1)) -> dict[str, np.ndarray]:
    """Noise of the right shape."""
    rng = np.random.default_rng(0)
    return {
        "x": rng.integers(0, 256, (count, *shape)).astype(np.uint8),
        "y": (np.arange(count) % classes).astype(np.int32),
    }


def told(one: Callable[[str, int], Found], method: str, seeds: int) -> list[str]:
    """Each figure's mean over seeds, with its standard deviation where there are several."""
    found = np.array([one(method, seed) for seed in range(seeds)])
    spread = found.std(0, ddof=1) if seeds > 1 else [None] * found.shape[1]
    return [f"{m:.2f}" if s is None else f"{m:.2f} ± {s:.2f}" for m, s in zip(found.mean(0), spread, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("agnostic", "label-skew"))
    parser.add_argument("--data", choices=tuple(SKEWED), default="fashion_mnist")
    parser.add_argument("--split", choices=("dirichlet", "few-classes"), default="dirichlet")
    parser.add_argument("--methods", help="some of the methods, joined by commas")
    parser.add_argument("--rounds", type=int, help="by default the paper's")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="on random pictures")
    options = parser.parse_args()
    if options.tiny:
        options.rounds, options.seeds = options.rounds or 2, min(options.seeds, 2)
    try:
        {"agnostic": agnostic, "label-skew": label_skew}[options.table](options)
    except fc.InvalidInput as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
