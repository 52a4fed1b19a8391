"""Audits an uplink's privacy: attacks it with a canary client in thousands of replays, and bounds epsilon from below.

  python -m experiments.audit
  python -m experiments.audit --uplink="clip_by_global_norm(0.5)|gaussian(3.0, mechanism=tree(8))"
  python -m experiments.audit --bug=no_clip

The canary sends a huge update in a direction that nobody else's has, in each of its rounds or in none. The attacker
knows all else, sees what the server does in each round, and says whether the canary was there. From how often it is
right follows a lower bound of epsilon at a confidence, whatever the mechanism. Under the accountant's epsilon it finds
nothing wrong, which is no proof; over it the implementation is broken, and the exit code is 1.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

import fedjax_clip as fc
from experiments import binary, privacy
from fedjax_clip import checks
from fedjax_clip.keys import seeded
from fedjax_clip.typing import InvalidInput

SIZE = 8  # of the model
CANARY = 8  # examples of the canary; the others have one, so that weights would show


class Audit(NamedTuple):
    """What came of it.

    Attributes:
      audited: lower bound of epsilon.
      epsilon: what the accountant says.
      present, absent: ``[replays]`` the attacker's scores.
    """

    audited: float
    epsilon: float
    present: np.ndarray
    absent: np.ndarray


def audit(
    uplink: fc.Uplink,
    reducer: fc.Reducer | None = None,
    *,
    num_clients: int = 12,
    cohort_size: int = 4,
    rounds: int = 6,
    replays: int = 4000,
    delta: float = 1e-3,
    confidence: float = 0.99,
    seed: int = 0,
) -> Audit:
    """Replays a small training with and without the canary, all in one program, and compares.

    The score is a likelihood ratio's: ``(C u) . (C y)``, y what the model moves in the canary's direction in each
    round, u the canary's rounds and C the mechanism's strategy. Half of the replays choose its threshold.

    Args:
      uplink: with the server's noise.
      reducer: ``fc.fixed_mean(cohort_size)`` by default.
      num_clients, cohort_size, rounds: of a round robin; the canary is client 0.
      replays: with the canary, and as many without.
      delta: of the guarantee.
      confidence: that the bound holds: of a right implementation one audit in ``1 / (1 - confidence)`` errs at most.
      seed: of all noise.

    Raises:
      InvalidInput: an uplink without the server's noise, numbers that cannot be.

    Source: Nasr et al. (2021), "Adversary Instantiation", with Clopper and Pearson's intervals, by jax-privacy; Andrew
    et al. (2024), "One-shot Empirical Privacy Estimation for Federated Learning", for canaries of one direction.
    """
    from jax_privacy.auditing import CanaryScoreAuditor, Split

    checks.count("rounds", rounds, most=1000)
    checks.count("replays", replays, 20, 10**8)  # half of them choose the threshold, the others are judged by it
    checks.count("clients", num_clients, most=10**6)
    seed = checks.seed("seed", seed)
    if uplink.promises.noise is not fc.uplink.Noise.SERVER:
        raise InvalidInput("Only the server's noise is audited: --uplink needs gaussian(...) behind a clip.")
    if not 0.5 < confidence < 1:
        raise InvalidInput(f"confidence must lie between 0.5 and 1, not {confidence}.")
    sampler = fc.sampling.round_robin(cohort_size)
    z, made = fc.privacy.together(uplink.promises.noise_multipliers), uplink.promises.mechanism
    epsilon = fc.privacy.epsilon(z, sampler, num_clients, rounds, delta, "pld", made)
    ids = [sampler.sample(np.ones(num_clients), 0, r) for r in range(rounds)]
    moved = replay(uplink, reducer or fc.fixed_mean(cohort_size), ids, num_clients, replays, seed)
    strategy = np.eye(rounds) if made is None else np.asarray(made.strategy(rounds), float)
    took_part = np.array([0 in cohort for cohort in ids], float)
    absent, present = moved @ strategy.T @ (strategy @ took_part)
    auditor = CanaryScoreAuditor(present, absent)
    audited = auditor.epsilon_clopper_pearson(1 - confidence, delta, threshold_strategy=Split(seed=seed))
    return Audit(float(audited), epsilon, present, absent)


def replay(
    uplink: fc.Uplink, reducer: fc.Reducer, ids: list[np.ndarray], num_clients: int, replays: int, seed: int
) -> np.ndarray:
    """``[2, replays, rounds]``: the model's move in the canary's direction, without the canary and with it."""
    sizes = np.where(np.arange(num_clients) == 0, CANARY, 1)
    slope = np.random.default_rng(0).normal(size=(num_clients, SIZE)).astype(np.float32)
    slope[:, 0] = 0
    slope[0] = 0
    examples = {"slope": np.repeat(slope, sizes, axis=0), "canary": np.repeat(np.arange(num_clients) == 0, sizes)}
    data = fc.FederatedData(examples, np.concatenate([[0], np.cumsum(sizes)]))
    state = fc.ClientState((), uplink.init_client(jnp.zeros(SIZE)))
    if jax.tree.leaves(state):
        raise InvalidInput("An audit has no place for what clients keep: leave links with a memory out of --uplink.")
    options: dict[str, Any] = {"seed": 0, "first_round": 0, "width": len(ids[0]), "population": examples}
    options["state"] = state
    cohorts = fc.plan_rounds(data, ids, fc.LocalWork(CANARY), **options)
    population = cohorts.population
    cohorts = jax.tree.map(lambda x: x[0], dataclasses.replace(cohorts, population=None))

    def one(present, key):
        def loss(params, batch, _):
            return -(batch["slope"] @ params) - jnp.where(batch["canary"], 1e4 * present, 0) * params[0]

        algorithm = fc.fedavg(loss, optax.sgd(1.0), uplink=uplink, reducer=reducer)

        def round(server, cohort):
            after = algorithm.round(server, dataclasses.replace(cohort, population=population), key)[0]
            return after, after.params[0] - server.params[0]

        return jax.lax.scan(round, algorithm.init(jnp.zeros(SIZE)), cohorts)[1]

    keys = jax.random.split(seeded(seed), (2, replays))
    return np.asarray(jax.jit(jax.vmap(jax.vmap(one, (None, 0))))(jnp.arange(2.0), keys), np.float64)


def without_clip(link: fc.Uplink) -> fc.Uplink:
    """The planted bug of a clip that promises its bound and does not clip."""

    def encode(update, state, client_state, ctx):
        return update, *link.encode(update, state, client_state, ctx)[1:]

    return link if link.promises.bound is None else link._replace(encode=encode)


def with_noise_divided_twice(link: fc.Uplink) -> fc.Uplink:
    """The planted bug of noise on the scale of the mean's sensitivity, divided by the cohort's size once more."""

    def decode(aggregate, state, report, ctx):
        return link.decode(aggregate, state, report, ctx._replace(denominator=ctx.denominator**2))

    return link if link.promises.noise is not fc.uplink.Noise.SERVER else link._replace(decode=decode)


def weighted_by_examples(denominator: float) -> fc.Reducer:
    """The planted bug of a mean with a fixed denominator in which clients weigh their examples."""
    fixed = fc.fixed_mean(denominator)

    def add(acc, messages, weights):
        return fixed.add(acc, jax.tree.map(lambda m: jnp.einsum("c,c...->c...", weights, m), messages), weights)

    return fixed._replace(add=add)


BUGS: Mapping[str, str] = {
    "none": "the implementation as it is",
    "no_clip": "the clip promises its bound and does not clip",
    "noise": "the noise is divided by the cohort's size twice",
    "weights": "clients weigh their examples",
}
LINKS: Mapping[str, Callable[[fc.Uplink], fc.Uplink]] = {"no_clip": without_clip, "noise": with_noise_divided_twice}


def planted(links: list[fc.Uplink], bug: str, cohort_size: int) -> tuple[fc.Uplink, fc.Reducer]:
    """The chain of these links and its reducer, with a bug of ``BUGS`` in them."""
    spoil = LINKS.get(bug, lambda link: link)
    reducer = weighted_by_examples(cohort_size) if bug == "weights" else fc.fixed_mean(cohort_size)
    return fc.uplink.chain(*(spoil(link) for link in links)), reducer


def define_flags() -> None:
    """Defines the flags; not on import, for other binaries have flags of the same names."""
    flags.DEFINE_string("uplink", "clip_by_global_norm(1.0)|gaussian(2.0)", "What is audited; see experiments.run.")
    flags.DEFINE_enum("bug", "none", list(BUGS), "A bug to plant, to see that it is found.")
    flags.DEFINE_integer("clients", 12, "Clients, in turn.")
    flags.DEFINE_integer("cohort_size", 4, "Clients a round.")
    flags.DEFINE_integer("rounds", 6, "Rounds of a replay.")
    flags.DEFINE_integer("replays", 100_000, "Replays with the canary, and as many without.")
    flags.DEFINE_float("delta", 1e-3, "Delta of the guarantee.")
    flags.DEFINE_float("confidence", 0.99, "That the lower bound holds.")
    flags.DEFINE_integer("seed", 0, "Of all noise.")


def main() -> None:
    """Audits what the flags say."""
    values = flags.FLAGS
    binary.configure_jax(1)
    uplink, reducer = planted(privacy.links(values.uplink), values.bug, values.cohort_size)
    found = audit(
        uplink,
        reducer,
        num_clients=values.clients,
        cohort_size=values.cohort_size,
        rounds=values.rounds,
        replays=values.replays,
        delta=values.delta,
        confidence=values.confidence,
        seed=values.seed,
    )
    broken = found.audited > found.epsilon
    print(f"{values.uplink}: {BUGS[values.bug]}")
    print(f"accounted   epsilon {found.epsilon:.3f} at delta {values.delta:g}, for one client's presence")
    print(f"audited     epsilon at least {found.audited:.3f}, at {values.confidence:.1%} confidence")
    print("BROKEN: less private than accounted for" if broken else "nothing wrong found, which is no proof")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    define_flags()
    binary.run(main, __doc__ or "")
