"""Privacy audits: replays of a run with and without canaries bound epsilon from below."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

from fedjax_clip.core import checks, tree
from fedjax_clip.core.types import Algorithm, InvalidInput, Params
from fedjax_clip.data.sampling import Sampler
from fedjax_clip.privacy import scores
from fedjax_clip.privacy.accounting import epsilon as epsilon_of
from fedjax_clip.privacy.canaries import HUGE, Build, Stage, Trial
from fedjax_clip.privacy.gaussians import together
from fedjax_clip.privacy.noise_shares import distributed
from fedjax_clip.privacy.participation import Separated
from fedjax_clip.uplink.mechanism import Mechanism
from fedjax_clip.uplink.promises import Noise

DELTAS = 0.01, 0.1, 0.3  # the claim must hold at these, too: together they bound the whole trade-off curve


class Claim(NamedTuple):
    """A run's privacy claim and its neighbouring relation.

    Attributes:
      epsilon: of all rounds, ``delta -> epsilon``.
      neighbours: ``"presence"`` (add or remove a client), ``"zeros"`` (zero out a client's update, or a record's
        gradient), or ``"data"`` (replace a client's message).
      noise_multiplier: z, of one round.
      gaussian: whether all rounds together are one Gaussian mechanism: no random participation, no grid.
      messages: whether the attacker sees every message, not only their sum.
      mechanism: of the noise over the rounds.
    """

    epsilon: Callable[[float], float]
    neighbours: str
    noise_multiplier: float
    gaussian: bool
    messages: bool = False
    mechanism: Mechanism | None = None


class Audit(NamedTuple):
    """The result of an audit.

    Attributes:
      audited: lower bound of epsilon, at the given confidence.
      accounted: the epsilon that the run claims.
      delta: of both: yours, or one at which the claim fails.
      neighbours: the neighbouring relation; see ``Claim``.
      attack: the canary and the score that gave the bound.
      estimator: the method that turned scores into the bound.
      attempts: number of bounds tried; the confidence holds over all of them.

    Example:
      >>> uplink = fc.uplink.chain(fc.uplink.clip_by_global_norm(1.0), fc.uplink.gaussian(2.0))
      >>> build = functools.partial(fc.fedavg, uplink=uplink, reducer=fc.reduce.fixed_mean(4))
      >>> found = fc.privacy.audit(build, fc.data.sampling.round_robin(4), num_clients=12, delta=1e-3, replays=300)
      >>> found.broken
      False
    """

    audited: float
    accounted: float
    delta: float
    neighbours: str
    attack: str
    estimator: str
    attempts: int

    @property
    def broken(self) -> bool:
        """Whether the run is less private than accounted for. False proves nothing."""
        return self.audited > self.accounted


def audit(
    build: Build,
    sampler: Sampler,
    *,
    num_clients: int,
    delta: float,
    rounds: int = 6,
    noise_multiplier: float | None = None,
    records: bool = False,
    epsilon: Callable[[float], float] | None = None,
    published: Sequence[str] = (),
    params: Params | None = None,
    replays: int = 2000,
    confidence: float = 0.999,
    seed: int = 0,
) -> Audit:
    """Replays your algorithm, links, reducer, mechanism and sampler with canaries, and bounds epsilon from below.

    A canary is a client, or a record, with a huge gradient in a direction that no other gradient has. In each replay a
    coin decides whether the canary is present. The attacker knows everything else, sees what the claim allows in every
    round, and guesses the coin. Its success rate bounds epsilon from below, for any mechanism. A bound above the
    accountant's epsilon proves that the implementation is broken; a bound below it proves nothing. All replays are
    lanes of one compiled program.

    You provide the algorithm with all its parts except the two optimisers, the sampler, and the numbers of clients and
    rounds. The audit provides the model (a few numbers, unless you give ``params``), the data, a linear loss and plain
    SGD on both sides. It may, because privacy must hold for any messages and any server step.

    Canaries: a huge update or none; the same while the other clients send nothing; an update that is not finite.
    Scores: the likelihood ratio under the claimed noise, Fisher's discriminant of the whole view, numbers in impossible
    ranges, and numbers that recur to the last bit. Bounds: Clopper and Pearson's at several deltas, and one for runs
    with several canaries. The confidence is shared among all of them (Bonferroni).

    Args:
      build: ``(loss, client_tx, server_tx) -> Algorithm``, such as ``functools.partial(fc.fedavg, uplink=...,
        reducer=...)``. If single messages are private (``local_gaussian``, ``private_gradient``), it must also take
        ``reducer=``: the audit passes one that lets the server read them.
      sampler: from ``fc.data.sampling``.
      num_clients: M, of the population.
      delta: of the guarantee.
      rounds: R, of a replay.
      noise_multiplier: z of ``local_gaussian`` or ``private_gradient``, which no promise carries.
      records: whether the canary is one record of a client, for ``private_gradient``.
      epsilon: the claim for these rounds, ``delta -> epsilon``; by default that of ``fc.privacy``.
      published: names of metrics that are made public with the model, such as ``clients``; a name covers all metrics
        that begin with it.
      params: of the model, ``{"a": [4], "b": [2, 4], "c": [4]}`` by default; only shapes and names matter.
      replays: number of replays of each canary.
      confidence: of the lower bound: one in ``1 / (1 - confidence)`` correct implementations is called broken.
      seed: of all draws.

    Returns:
      An ``Audit``: ``found.audited``, ``found.accounted``, ``found.broken``.

    Raises:
      InvalidInput: no noise to audit; noise or a sampler without accounting, if no ``epsilon`` is given; numbers out of
        range.

    Example:
      >>> uplink = fc.uplink.chain(fc.uplink.clip_by_global_norm(1.0), fc.uplink.gaussian(2.0))
      >>> build = functools.partial(fc.fedavg, uplink=uplink, reducer=fc.reduce.fixed_mean(4))
      >>> found = fc.privacy.audit(build, fc.data.sampling.round_robin(4), num_clients=12, delta=1e-3, replays=300)

    Source: Jagielski, Ullman and Oprea (2020), "Auditing Differentially Private Machine Learning"; Nasr et al. (2021),
    "Adversary Instantiation"; Andrew et al. (2024), "One-shot Empirical Privacy Estimation for Federated Learning", for
    canaries of one direction.
    """
    num_clients, rounds = (
        checks.count("num_clients", num_clients, most=10**6),
        checks.count("rounds", rounds, most=1000),
    )
    replays, seed = checks.count("replays", replays, 100, 10**7), checks.seed("seed", seed)
    checks.kind("sampler", sampler, Sampler, "one of fc.data.sampling (nobody can account for a clock)")
    checks.fraction("delta", delta)
    if not 0.5 < confidence < 1:
        raise InvalidInput(f"confidence must lie between 0.5 and 1, not {confidence}.")
    params = {"a": jnp.zeros(4), "b": jnp.zeros((2, 4)), "c": jnp.zeros(4)} if params is None else params
    algorithm = build(lambda params, batch, key: jnp.zeros(()), optax.sgd(1.0), optax.sgd(1.0))
    claim = claimed(algorithm, sampler, num_clients, rounds, params, noise_multiplier, records)
    if epsilon is not None:
        claim = claim._replace(epsilon=epsilon)
    deltas = (delta, *(x for x in DELTAS if x > delta))
    accounted = {x: claim.epsilon(x) for x in deltas}
    chosen = sampler, num_clients, rounds, params, tuple(f"{name}/" for name in published), records, claim.messages
    stage = Stage(build, *chosen, replays, seed)
    strategy = np.eye(rounds) if claim.mechanism is None else np.asarray(claim.mechanism.strategy(rounds), np.float64)
    law = scores.Law(claim.noise_multiplier, strategy, claim.neighbours == "data")

    def outcome(bound: float, at: float, attack: str, estimator: str) -> Audit:
        return Audit(bound, accounted[at], at, claim.neighbours, attack, estimator, attempts)

    trials = trials_of(claim)
    attempts = sum(1 if trial.several else scores.SCORES * len(deltas) for trial in trials)
    significance = (1 - confidence) / attempts
    found: list[Audit] = []
    for trial in trials:
        seen = stage.replay(trial)
        if trial.several:
            ratios = [scores.likelihood_ratio(law, seen, canary) for canary in range(stage.canaries)]
            pooled = np.concatenate(ratios), seen.present.T.ravel()
            by, bound = scores.one_run(*pooled, significance, delta, claim.gaussian, seed)
            found.append(outcome(bound, delta, f"{trial.name}; likelihood ratio", by))
            continue
        for name, score, there in scores.scores(seen, law):
            bounds = [(at, scores.bound(score, there, significance, at, seed)) for at in deltas]
            found += [outcome(bound, at, f"{trial.name}; {name}", "Clopper-Pearson") for at, bound in bounds]
    return max(found, key=lambda audit: (audit.broken, audit.delta == delta, audit.audited - audit.accounted))


def claimed(
    algorithm: Algorithm,
    sampler: Sampler,
    num_clients: int,
    rounds: int,
    params: Params,
    noise_multiplier: float | None,
    records: bool,
) -> Claim:
    """The claim of an algorithm's parts; arguments as for ``audit``."""
    if (parts := algorithm.parts) is None:
        raise InvalidInput("Only built-in algorithms say what they are made of, and so what noise they claim to add.")
    promises, everyone = parts.uplink.promises, sampler.cohort_size == num_clients
    replaced = sampler.scheme == "uniform" and not everyone
    present = "data" if replaced else "zeros" if sampler.scheme == "truncated_poisson" else "presence"

    def account(z: Any, sampler: Sampler | Separated = sampler) -> Callable[[float], float]:
        return lambda delta: epsilon_of(z, sampler, num_clients, rounds, delta, mechanism=promises.mechanism)

    if records or promises.noise is Noise.CLIENT:
        if noise_multiplier is None:
            raise InvalidInput("Say noise_multiplier=, of local_gaussian or of private_gradient: no promise tells it.")
        z = noise_multiplier if records else noise_multiplier / 2
        messages = parts.reducer.threshold is None
        return Claim(account(z, Separated(1)), "zeros" if records else "data", z, True, messages)
    if promises.noise is Noise.SERVER:
        z = together([float(z) for z in promises.noise_multipliers])
        known = sampler.scheme == "round_robin" or everyone
        return Claim(account(z), present, z, known, mechanism=promises.mechanism)
    if promises.noise is Noise.SHARES:
        grid = promises.grid(tree.size(params), parts.reducer.denominator, parts.reducer.threshold)
        z = float(grid.stddev * np.sqrt(grid.clients) / grid.l2)
        curve = distributed(parts.uplink, params, parts.reducer)
        return Claim(account(curve), "data" if replaced else "zeros", z, False)
    raise InvalidInput(
        "There is no noise to audit: put gaussian(1.0), skellam(1.0) or local_gaussian(1.0) behind a clip, or audit "
        "private_gradient by records=True."
    )


def trials_of(claim: Claim) -> list[Trial]:
    """The attacker's pairs of neighbouring runs for a claim."""
    absent = {"presence": None, "zeros": 0.0, "data": -HUGE}[claim.neighbours]
    other = {"presence": "no client", "zeros": "zeros", "data": "its opposite"}[claim.neighbours]
    huge = Trial(f"a huge update or {other}", HUGE, absent)
    broken = Trial(f"an update that is not finite or {other}", np.nan, absent, quiet=True)
    if claim.messages:
        return [huge, huge._replace(name=f"{huge.name}, less another message", contrast=-1.0), broken]
    alone = huge._replace(name=f"{huge.name}, where nobody else sends", quiet=True)
    return [huge, alone, broken, huge._replace(name=f"several: {huge.name}", several=True)]
