"""What leaks, for ``docs/leaks.md``: gradient inversion of one message, and membership inference from a model.

python benchmarks/leaks.py            prints both tables
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fedjax_clip as fc
from fedjax_clip.uplink.base import Message

IMAGES, HIDDEN, CLIP = 20, 32, 0.1
SHADOWS, MEMBERS, ROUNDS = 8, 120, 40


def per_example_loss(params, batch, key):
    """Cross-entropy of a network with one sigmoid layer, which is twice differentiable, as DLG needs."""
    logits = jax.nn.sigmoid(batch["x"] @ params["w"] + params["b"]) @ params["v"] + params["c"]
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return losses, {"accuracy": (logits.argmax(-1) == batch["y"]).astype(jnp.float32)}


def start(seed: int, hidden: int = HIDDEN) -> dict[str, np.ndarray]:
    """Glorot's initialisation."""
    rng = np.random.default_rng(seed)
    w, v = rng.normal(size=(64, hidden)) / 8, rng.normal(size=(hidden, 10)) / np.sqrt(hidden)
    shapes = {"w": w, "b": np.zeros(hidden), "v": v, "c": np.zeros(10)}
    return {name: x.astype(np.float32) for name, x in shapes.items()}


def digits() -> dict[str, np.ndarray]:
    """``{"x": float32 [1797, 64] in 0..1, "y"}``, shuffled."""
    examples = fc.data.sources.digits().examples
    order = np.random.default_rng(0).permutation(len(examples["y"]))
    x = examples["x"].reshape(-1, 64).astype(np.float32)
    return {"x": x[order] / x.max(), "y": examples["y"][order]}


def messages() -> dict[str, fc.uplink.Uplink]:
    """What a client does to its update."""
    clip = fc.uplink.clip_by_global_norm(CLIP)
    return {
        "nothing": fc.uplink.identity(),
        f"clip {CLIP:g}": clip,
        "top 10%": fc.uplink.compress(fc.compression.top_k(0.1)),
        "sign": fc.uplink.compress(fc.compression.sign()),
        "clip, noise 0.03": fc.uplink.chain(clip, fc.uplink.local_gaussian(0.03)),
        "clip, noise 0.3": fc.uplink.chain(clip, fc.uplink.local_gaussian(0.3)),
    }


def inversion(examples: dict[str, np.ndarray], batch_size: int) -> None:
    """How often the closest image of all to what was rebuilt is one that the client has, in percent."""
    params = start(0)
    own = {k: x[: IMAGES * batch_size].reshape(IMAGES, batch_size, *x.shape[1:]) for k, x in examples.items()}

    def attacked(link, batch, key):
        """The input by the first layer, and by search, from what a client sends after one step of SGD at rate 1."""
        gradient = jax.grad(lambda p: jnp.mean(per_example_loss(p, batch, None)[0]))(params)
        update = jax.tree.map(jnp.negative, gradient)
        ctx = fc.uplink.Context(key, key, jnp.int32(0), jnp.float32(1))
        sent, *_ = link.encode(update, link.init(params), link.init_client(params), ctx)
        update = sent.value if isinstance(sent, Message) else sent
        guess, like = {**batch, "x": jnp.zeros_like(batch["x"])}, jax.tree.map(jnp.negative, update)
        found, _ = fc.attacks.inverted(
            per_example_loss, params, like, guess, jax.random.fold_in(key, 1), match="cosine"
        )
        return fc.attacks.dense_inputs(update["w"], update["b"])[None], found

    for name, link in messages().items():
        keys = jax.random.split(jax.random.key(0), IMAGES)
        rebuilt = jax.jit(jax.vmap(functools.partial(attacked, link)))(own, keys)
        shown = []
        for found in map(np.asarray, rebuilt):  # [IMAGES, K, 64]
            nearest = np.linalg.norm(found[:, :, None] - examples["x"], axis=-1).argmin(-1)
            shown.append(100 * np.mean(nearest // batch_size == np.arange(IMAGES)[:, None]))
        print(f"| {name} | {batch_size} | {shown[0]:.0f} | {shown[1]:.0f} |", flush=True)


def trainings() -> dict[str, dict]:
    """Arguments of FedAvg by defence."""
    sgd = optax.sgd(1.0)
    private = fc.local.private_gradient(0.5, 1.0)
    clip = fc.uplink.clip_by_global_norm(0.3)
    return {
        "nothing": {"client_tx": sgd},
        "clip the update to 0.3": {"client_tx": sgd, "uplink": clip},
        "top 10%": {"client_tx": sgd, "uplink": fc.uplink.compress(fc.compression.top_k(0.1))},
        "clip, noise 0.5 on the sum": {
            "client_tx": sgd,
            "uplink": fc.uplink.chain(clip, fc.uplink.gaussian(0.5)),
            "reducer": fc.reduce.fixed_mean(6),
        },
        "each example's gradient clipped, noise 1": {"client_tx": sgd, "gradient": private},
    }


def membership(examples: dict[str, np.ndarray]) -> None:
    """AUC of the threshold and of LiRA, true positives at 1% false ones, and the model's accuracy."""
    rng = np.random.default_rng(1)
    pool = {k: x[: 2 * MEMBERS] for k, x in examples.items()}
    whole = fc.FederatedData(pool, np.array([0, 2 * MEMBERS]))
    test = {k: x[2 * MEMBERS :] for k, x in examples.items()}
    inside = np.stack([rng.permutation(2 * MEMBERS) < MEMBERS for _ in range(1 + SHADOWS // 2)])
    inside = np.concatenate([inside[:1], inside[1:], ~inside[1:]])  # each example in half of the shadow models
    for name, parts in trainings().items():
        algorithm, losses, accuracy = fc.fedavg(per_example_loss, **parts), [], []
        for number, chosen in enumerate(inside):
            rows = np.flatnonzero(chosen)
            data = fc.FederatedData.from_assignment({k: x[rows] for k, x in pool.items()}, np.arange(MEMBERS) % 6)
            ran = fc.train(
                algorithm,
                data,
                start(number, 64),
                rounds=ROUNDS,
                cohort_size=6,
                batch_size=20,
                local_epochs=5,
                seed=number,
                devices=jax.devices()[:1],
            )
            losses.append(fc.attacks.losses_of(per_example_loss, ran.params, whole))
            accuracy.append(float(np.mean(per_example_loss(ran.params, test, None)[1]["accuracy"])))
        threshold = fc.attacks.separation(-losses[0], inside[0])
        lira = fc.attacks.separation(
            fc.attacks.likelihood_ratios(losses[0], np.stack(losses[1:]), inside[1:]), inside[0]
        )
        print(
            f"| {name} | {threshold['auc']:.2f} | {lira['auc']:.2f} | {100 * lira['true_positives']:.0f} | "
            f"{100 * np.mean(accuracy):.1f} |",
            flush=True,
        )


def main() -> None:
    examples = digits()
    print("| the client's message | examples | first layer, % | search, % |\n|---|---|---|---|")
    for batch_size in (1, 4):
        inversion(examples, batch_size)
    print("\n| training | threshold, AUC | LiRA, AUC | LiRA at 1%, % | accuracy, % |\n|---|---|---|---|---|")
    membership(examples)


if __name__ == "__main__":
    main()
