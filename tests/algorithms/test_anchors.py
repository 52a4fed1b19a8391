"""EWC and LwF: their papers' formulas, and one program for all phases."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import parameters, population, softmax_loss

import fedjax_clip as fc
from fedjax_clip.core.keys import seeded


def logits(params, batch):
    return batch["x"] @ params["w"] + params["b"]


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def squares(params, x, y):
    """Mean square of each parameter's gradient over examples, of softmax regression, in float64."""
    p = softmax(x.astype(np.float64) @ params["w"] + params["b"]) - np.eye(3)[y]
    return {"w": np.einsum("nf,nk->nfk", x, p) ** 2, "b": p**2}


def test_fisher_information_is_the_clients_mean_weighed_by_their_examples():
    data, params = population(), parameters()
    x, y = data.examples["x"], data.examples["y"]
    own = [slice(a, b) for a, b in zip(data.offsets[:-1], data.offsets[1:])]
    means = [{k: v.mean(0) for k, v in squares(params, x[o], y[o]).items()} for o in own]
    wanted = {k: np.average([m[k] for m in means], axis=0, weights=data.sizes) for k in ("w", "b")}
    for batch_size in (7, 100):  # 34 examples: the last batch is padded
        found = fc.local.fisher(softmax_loss, params, data, batch_size=batch_size)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, wanted)

    stream = fc.data.stream.in_order(data, rounds=4)
    live = stream.lives[:, 0] <= 1
    found = fc.local.fisher(softmax_loss, params, stream, round=1, batch_size=8)
    wanted = {k: v.mean(0) for k, v in squares(params, x[live], y[live]).items()}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, wanted)
    with pytest.raises(fc.InvalidInput, match="In round 9 of the stream nobody has an example"):
        fc.local.fisher(softmax_loss, params, fc.data.stream.between(data, end=9), round=9)


def test_the_penalties_of_all_phases_are_one():
    """Its gradient is that of ``l + strength / 2 sum_p sum_i F_pi (theta_i - a_pi)^2``."""
    rng = np.random.default_rng(0)
    random = lambda: jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), parameters())  # noqa: E731
    anchors, fishers, now = (
        [random() for _ in range(3)],
        [jax.tree.map(np.square, random()) for _ in range(3)],
        random(),
    )
    for f in fishers:
        f["b"][0] = 0  # a parameter that never mattered
    whole = fc.local.anchored(anchors[0])
    for a, f in zip(anchors, fishers):
        whole = fc.local.consolidated({**whole, "model": a}, f)
    batch, key = {k: v[:6] for k, v in population().examples.items()}, seeded(0)

    def total(loss):
        return lambda model: jnp.mean(loss({**whole, "model": model}, batch, key)[0])

    plain = jax.grad(total(lambda params, batch, key: softmax_loss(params["model"], batch, key)))(now)
    found = jax.grad(total(fc.local.ewc(softmax_loss, 3.0)))(now)
    for k in ("w", "b"):
        pull = 3.0 * sum(f[k].astype(float) * (now[k] - a[k]) for a, f in zip(anchors, fishers))
        np.testing.assert_allclose(found[k], plain[k] + pull, rtol=1e-4, atol=1e-5)
    held = fc.local.ewc(softmax_loss, 3.0)({**whole, "model": now}, batch, None)[0]
    np.testing.assert_array_equal(held, softmax_loss(now, batch, None)[0])  # no penalty in evaluation


@pytest.mark.parametrize("known", [(0, 1), (), (2,)])
def test_lwf_is_li_and_hoiems_cross_entropy_over_known_classes(known):
    old, new = parameters(seed=1), parameters(seed=2)
    batch = {k: v[:6] for k, v in population().examples.items()}
    whole = {**fc.local.taught(old, np.isin(np.arange(3), known)), "model": new}
    found, values = fc.local.lwf(softmax_loss, logits, strength=0.7, temperature=2.0)(whole, batch, seeded(0))
    plain, _ = softmax_loss(new, batch, None)
    teacher, student = (np.asarray(logits(p, batch), np.float64)[:, list(known)] / 2.0 for p in (old, new))
    distilled = -(softmax(teacher) * np.log(softmax(student))).sum(-1) if known else 0.0
    np.testing.assert_allclose(found, plain + 0.7 * distilled, rtol=1e-5)
    assert set(values) == {"accuracy"}
    gradient = jax.grad(
        lambda p: jnp.sum(fc.local.lwf(softmax_loss, logits)({**whole, "model": p}, batch, seeded(0))[0])
    )
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient(new)))


def test_one_program_serves_all_phases_and_anchors_stay():
    compiled = []
    algorithm = fc.partially_frozen(
        fc.fedavg(lambda *args: compiled.append(1) or fc.local.ewc(softmax_loss, 50.0)(*args), optax.sgd(0.1)),
        "^(anchor|fisher)/",
    )
    options = {"rounds": 2, "cohort_size": 3, "rounds_per_dispatch": 2, "devices": jax.devices()[:1]}
    data = population()
    first = fc.train(algorithm, data, fc.local.anchored(parameters()), **options)
    traced = len(compiled)
    whole = fc.local.consolidated(first.params, fc.local.fisher(softmax_loss, first.params["model"], data))
    second = fc.train(algorithm, data, whole, **options)
    checked = len(compiled) - traced  # fc.train asks the loss whether examples meet, at the beginning of each run
    assert checked < traced
    for name in ("anchor", "fisher"):
        jax.tree.map(np.testing.assert_array_equal, second.params[name], whole[name])
    pulled = np.abs(second.params["model"]["w"] - whole["anchor"]["w"]).max()
    free = fc.train(algorithm, data, fc.local.anchored(whole["model"]), **options).params["model"]["w"]
    assert pulled < np.abs(free - whole["anchor"]["w"]).max()


def test_strengths_out_of_range_are_refused():
    with pytest.raises(fc.InvalidInput, match="ewc: strength"):
        fc.local.ewc(softmax_loss, -1.0)
    with pytest.raises(fc.InvalidInput, match="lwf: temperature"):
        fc.local.lwf(softmax_loss, logits, temperature=0.0)
