"""The problems, attacks and defences that the robustness benchmark compares."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import fedjax_clip as fc
from experiments.config import outside, spec
from experiments.config.components import Components, Make, filled, later
from experiments.config.registry import REDUCERS
from fedjax_clip import attacks, models, reduce, tasks
from fedjax_clip.core.keys import seeded
from fedjax_clip.core.types import Params, PerExampleLoss


@dataclasses.dataclass(frozen=True)
class Problem:
    """A problem: clients, some of them malicious, and their task.

    Attributes:
      name: in the report.
      data: of the clients that train; all take part in every round.
      test: held-out examples.
      root: the server's own examples, for FLTrust.
      loss, start: the loss, and ``seed -> params``.
      bad: indices of the malicious clients.
      pattern: of the backdoor, arguments of ``fc.attacks.backdoor``.
      client_lr, rounds, work: of the training.
      clips: bounds on the norm of a message, which the server enforces; ``inf`` for none.
      attacks, defences: those compared, by name.
      wide: whether clients train side by side, which is slow for large models on a CPU.
      published: accuracy in per cent, by defence, where there is a paper.
    """

    name: str
    data: fc.FederatedData
    test: fc.FederatedData
    root: dict[str, np.ndarray] | None
    loss: PerExampleLoss
    start: Callable[[int], Params]
    bad: tuple[int, ...]
    pattern: Mapping[str, Any]
    client_lr: float
    rounds: int
    work: fc.extend.LocalWork
    clips: tuple[float, ...]
    attacks: tuple[str, ...]
    defences: tuple[str, ...] = ("mean", "median", "trimmed mean", "Krum", "Multi-Krum", "RFA", "centered", "FLTrust")
    wide: bool = True
    published: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Attack(NamedTuple):
    """An attack: what malicious clients do to their data, to their messages, and together.

    Attributes:
      note: what it is, in a line.
      data: ``problem -> population`` with the malicious clients' data changed.
      link: ``problem -> uplink``, the last of the chain.
      collude: ``(problem, reducer) -> reducer``.
    """

    note: str
    data: Callable[[Problem], fc.FederatedData] = lambda p: p.data
    link: Callable[[Problem], fc.uplink.Uplink] = lambda p: fc.uplink.identity()
    collude: Callable[[Problem, fc.reduce.Reducer], fc.reduce.Reducer] = lambda p, reducer: reducer


ATTACKS: dict[str, Attack] = {
    "none": Attack("nobody is bad"),
    "label flip": Attack("label y becomes 9 - y", data=lambda p: attacks.label_flip(p.data, p.bad, 10)),
    "sign flip": Attack("-u (bit flipping)", link=lambda p: attacks.sign_flip(p.bad)),
    "scaling": Attack("-10 u", link=lambda p: attacks.scaling(p.bad, -10.0)),
    "ALIE": Attack("mean - 1.5 std of the honest", collude=lambda p, r: attacks.alie(r, p.bad, 1.5)),
    "IPM": Attack("-0.1 mean of the honest", collude=lambda p, r: attacks.ipm(r, p.bad, 0.1)),
    "strong IPM": Attack("-10 times the mean of the honest", collude=lambda p, r: attacks.ipm(r, p.bad, 10.0)),
    "mimic": Attack("what one honest client sends", collude=lambda p, r: attacks.mimic(r, p.bad, max(p.bad) + 1)),
    "huge": Attack("norm 1e18", link=lambda p: attacks.constant(p.bad)),
    "NaN": Attack("not a number: dropped by every round", link=lambda p: attacks.constant(p.bad, np.nan)),
    "backdoor": Attack(
        "a pattern on 80% of their examples, called 0, and the update times n / f",
        data=lambda p: attacks.backdoor(p.data, p.bad, fraction=0.8, **p.pattern),
        link=lambda p: attacks.scaling(p.bad, p.data.num_clients / len(p.bad)),
    ),
}
COMPARED = tuple(ATTACKS)  # by default; those below cost a call of the defence for each factor that they try
ATTACKS |= {
    "optimal ALIE": Attack("mean - z std, z as harms most", collude=lambda p, r: attacks.optimal_alie(r, p.bad)),
    "optimal IPM": Attack("-z mean, z as harms most", collude=lambda p, r: attacks.optimal_ipm(r, p.bad)),
}


class Defence(NamedTuple):
    """A defence: a reducer, and what it needs.

    Attributes:
      reducer: ``(problem, root's number) -> reducer``.
      trusted: whether the server's own examples take part, as the root.
      relative: whether messages are differences to the last aggregate.
    """

    reducer: Callable[[Problem, int], fc.reduce.Reducer]
    trusted: bool = False
    relative: bool = False


def _bucketed(name: str) -> Defence:
    inner = DEFENCES[name]
    return inner._replace(reducer=lambda p, root: reduce.bucketing(inner.reducer(p, root), 2))


def _krum_squared() -> fc.reduce.Reducer:
    """Krum with f = 0 as the bucketing paper's authors run it: by squares of squared distances."""

    def aggregate(stack):
        both = stack.present[:, None] & stack.present & ~jnp.eye(len(stack.ids), dtype=bool)
        rows = jnp.concatenate([x.reshape(len(x), -1) for x in jax.tree.leaves(stack.messages)], axis=1)
        squares = jax.lax.map(lambda row: jnp.sum(jnp.square(rows - row), axis=1), rows)
        squares /= jnp.max(jnp.where(both, squares, 0), initial=1e-30)  # their squares have room then
        nearest = jnp.arange(len(rows)) < stack.num_present - 2
        scores = jnp.sum(jnp.where(nearest, jnp.sort(jnp.where(both, jnp.square(squares), jnp.inf)), 0), axis=1)
        best = jnp.argmin(jnp.where(stack.present, scores, jnp.inf))
        return jax.tree.map(lambda x: x[best], stack.messages)

    return reduce.stacking(aggregate, fewest=3)


DEFENCES: dict[str, Defence] = {
    "mean": Defence(lambda p, root: fc.reduce.uniform_mean()),
    "median": Defence(lambda p, root: reduce.median()),
    "trimmed mean": Defence(lambda p, root: reduce.trimmed_mean(len(p.bad))),
    "Krum": Defence(lambda p, root: reduce.krum(len(p.bad))),
    "Multi-Krum": Defence(lambda p, root: reduce.krum(len(p.bad), p.data.num_clients - len(p.bad) - 2)),
    "RFA": Defence(lambda p, root: reduce.geometric_median(8, 0.1 * p.client_lr)),
    "centered": Defence(lambda p, root: reduce.centered_mean(10 * p.client_lr, 3), relative=True),
    "FLTrust": Defence(lambda p, root: reduce.fltrust(root), trusted=True),
    "NNM trimmed mean": Defence(lambda p, root: reduce.nnm(len(p.bad), reduce.trimmed_mean(len(p.bad)))),
    "ARC NNM trimmed mean": Defence(
        lambda p, root: reduce.arc(len(p.bad), reduce.nnm(len(p.bad), reduce.trimmed_mean(len(p.bad))))
    ),
    "MDA": Defence(lambda p, root: reduce.mda(len(p.bad))),
    "SMEA": Defence(lambda p, root: reduce.smea(len(p.bad))),
    "CAF": Defence(lambda p, root: reduce.caf(len(p.bad))),
    "Bulyan": Defence(lambda p, root: reduce.bulyan(len(p.bad))),
    "DnC": Defence(lambda p, root: reduce.dnc(len(p.bad), iterations=3)),
    "FLAME": Defence(lambda p, root: reduce.flame()),
    "Krum squared": Defence(lambda p, root: _krum_squared()),
}
BUCKETED = ("mean", "median", "Krum", "RFA", "centered", "Krum squared")
DEFENCES |= {f"bucketed {name}": _bucketed(name) for name in BUCKETED}


def attacks_named(names: Sequence[str], problem: Problem) -> dict[str, Attack]:
    """The attacks of these names; one with a dot is a function of ``--import``'s.

    ``(clients, ...)`` returns the link through which these malicious clients send; ``(reducer, clients, ...)`` returns
    the reducer that they deceive together. See ``fc.attacks`` for both.
    """

    def fit(make: Make) -> Callable[..., Attack]:
        takes, (note, *_) = list(inspect.signature(make).parameters), (inspect.getdoc(make) or "–").splitlines()
        together = takes[:1] == ["reducer"]

        def attack(*args: Any, **kwargs: Any) -> Attack:
            build = own(*args, **kwargs)
            if together:
                return Attack(
                    note, collude=lambda p, r: outside.checked(build(r, p.bad), fc.reduce.Reducer, make.__name__)
                )
            return Attack(note, link=lambda p: outside.checked(build(p.bad), fc.uplink.Uplink, make.__name__))

        own = later(make, 2 if together else 1)
        return functools.wraps(own)(attack)

    found = _named(names, ATTACKS, Components(Attack, {}, fit), "--attacks")
    for attack in found.values():
        attack.link(problem)
        attack.collude(problem, reduce.uniform_mean())
    return found


def defences_named(names: Sequence[str], problem: Problem) -> dict[str, Defence]:
    """The defences of these names; one with a dot is a function of ``--import``'s that returns a reducer.

    It is given, if it has arguments of these names, ``cohort_size`` and ``num_bad``.
    """

    def fit(make: Make) -> Callable[..., Defence]:
        known = {"cohort_size": problem.data.num_clients, "num_bad": len(problem.bad)}
        own = filled(make, **known)

        def defence(*args: Any, **kwargs: Any) -> Defence:
            reducer = outside.checked(own(*args, **kwargs), reduce.Reducer, make.__name__)
            return Defence(lambda p, root: reducer)

        return functools.wraps(own)(defence)

    return _named(names, DEFENCES, Components(Defence, {}, fit), "--defences")


def _named(names: Sequence[str], valid: Mapping[str, Any], own: Components, flag: str) -> dict[str, Any]:
    return {name: valid[name] if name in valid else spec.one(name, own, flag, REDUCERS) for name in names}


def digits() -> Problem:
    """Eleven forms of handwritten digits, two of them bad; accuracy on three forms that never train."""
    task = tasks.digits(hidden=(64,))
    return Problem(
        "digits",
        task.data,
        task.evaluation["clients"],
        _sample(task.evaluation["examples"].examples, 100),
        task.per_example_loss,
        lambda seed: task.init(seeded(seed)),
        bad=(0, 1),
        pattern={"features": [54, 55, 62, 63], "value": float(task.data.examples["x"].max()), "target": 0},
        client_lr=0.1,
        rounds=100,
        work=fc.extend.LocalWork(batch_size=20),
        clips=(np.inf, 0.2),
        attacks=COMPARED,
    )


def mnist(directory: str) -> Problem:
    """MNIST dealt to 20 clients of skewed labels, four of them bad."""
    examples, test = _halves(fc.data.sources.mnist(directory), 0.2)
    examples, root = _without(examples, 100)
    model = models.MLP((64,), 10)
    return Problem(
        "mnist",
        fc.data.partition.dirichlet(examples, 20, alpha=1.0, seed=0),
        _whole(test),
        root,
        tasks.classifier(model),
        lambda seed: model.init(seeded(seed), jnp.zeros((1, 28, 28, 1))),
        bad=(0, 1, 2, 3),
        pattern={"features": [28 * r + c for r in (24, 25, 26) for c in (24, 25, 26)], "value": 255, "target": 0},
        client_lr=0.1,
        rounds=40,
        work=fc.extend.LocalWork(batch_size=32, steps=5),
        clips=(np.inf, 0.2),
        attacks=COMPARED,
        wide=False,
    )


class Dropping(nn.Module):
    """``models.CNN`` with the dropout of the authors' network: of whole channels, and of hidden units.

    Attributes:
      channels, dense: as in ``models.CNN``; without channels, of pixels.
    """

    channels: tuple[int, ...]
    dense: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for width in self.channels:
            x = nn.relu(models.Conv(width, (3, 3), padding="VALID")(x))
        x = models.max_pool_2x2(x)
        x = nn.Dropout(0.25, broadcast_dims=(1, 2) if self.channels else (), deterministic=not train)(x)
        x = nn.relu(nn.Dense(self.dense)(x.reshape(len(x), -1)))
        return nn.Dense(10)(nn.Dropout(0.5, deterministic=not train)(x))


def _dropping(model: Dropping) -> PerExampleLoss:
    def per_example_loss(params, batch, key):
        rngs = {} if key is None else {"dropout": key}
        logits = jnp.asarray(model.apply(params, batch["x"], train=key is not None, rngs=rngs))
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
        return losses, {"accuracy": (jnp.argmax(logits, -1) == batch["y"]).astype(jnp.float32)}

    return per_example_loss


def long_tail(directory: str, channels: tuple[int, ...], dense: int, rounds: int, dropout: bool = False) -> Problem:
    """The bucketing paper's first table: MNIST sorted by label, class i cut to 0.5^i, 24 clients, nobody is bad.

    ``dropout`` is the authors'; they also compute Krum of squared squares, ``Krum squared``.

    Source: Karimireddy, He and Jaggi (2022), table 1 and the authors' logs of it, which these figures are from.
    """
    digits = fc.data.sources.mnist(directory)
    digits["x"] = ((digits["x"] / 255 - 0.1307) / 0.3081).astype(np.float32)  # as the authors scale them
    examples, test = (_long_tail(part) for part in _halves(digits, 0.3))
    owner = np.arange(len(examples["y"])) * 24 // len(examples["y"])  # sorted by label: equal shards
    model = Dropping(channels, dense)  # CNN's parameters, dropout or not
    loss = _dropping(model) if dropout else tasks.classifier(models.CNN(10, channels, dense))
    names = ("mean", "centered", "median", "RFA", "Krum")
    published = ("98.75 ± 0.02", "98.78 ± 0.06", "80.36 ± 0.05", "82.60 ± 0.84", "89.90 ± 4.75")
    bucketed = ("98.74 ± 0.02", "98.75 ± 0.02", "95.59 ± 0.89", "97.34 ± 0.58", "93.27 ± 0.10")
    both = dict(zip((*names, *(f"bucketed {name}" for name in names)), published + bucketed, strict=True))
    both |= {"Krum squared": both["Krum"], "bucketed Krum squared": both["bucketed Krum"]}
    return Problem(
        "long_tail with dropout" if dropout else "long_tail",
        fc.FederatedData.from_assignment(examples, owner),
        _whole(test),
        None,
        loss,
        lambda seed: model.init(seeded(seed), jnp.zeros((1, 28, 28, 1)), train=False),
        bad=(),
        pattern={},
        client_lr=0.01,
        rounds=rounds,
        work=fc.extend.LocalWork(batch_size=32, steps=1),
        clips=(np.inf,),
        attacks=("none",),
        defences=tuple(both),
        wide=not channels,
        published=both,
    )


def _halves(examples: dict[str, np.ndarray], fraction: float) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Examples to train on and to test on, in their order."""
    held_out = np.random.default_rng(0).random(len(examples["y"])) < fraction
    return {k: x[~held_out] for k, x in examples.items()}, {k: x[held_out] for k, x in examples.items()}


def _long_tail(examples: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Sorted by label; of class i the first ``0.5^i`` of its examples."""
    rows = [np.flatnonzero(examples["y"] == label) for label in range(10)]
    kept = np.concatenate([r[: int(len(r) * 0.5**label)] for label, r in enumerate(rows)])
    return {k: x[kept] for k, x in examples.items()}


def _without(examples: dict[str, np.ndarray], count: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    chosen = np.isin(np.arange(len(examples["y"])), np.random.default_rng(1).permutation(len(examples["y"]))[:count])
    return {k: x[~chosen] for k, x in examples.items()}, {k: x[chosen] for k, x in examples.items()}


def _sample(examples: dict[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    return _without(examples, count)[1]


def _whole(examples: dict[str, np.ndarray]) -> fc.FederatedData:
    return fc.FederatedData(examples, np.array([0, len(examples["y"])]))
