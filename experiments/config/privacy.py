"""The uplink of the flags, the epsilon of its noise, and the privacy statement of a run."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

import fedjax_clip as fc
from experiments.config import registry, spec
from fedjax_clip.core.types import InvalidInput


def build_uplink(
    text: str,
    target_epsilon: float | None,
    delta: float | None,
    rounds: int,
    sampler: fc.data.sampling.Sampler,
    num_clients: int,
    on_grid: Callable[[fc.uplink.Uplink], Any],
) -> tuple[fc.uplink.Uplink, np.ndarray | None]:
    """``--uplink``, with the noise that ``--target_epsilon`` allows, and epsilon by round if there is a ``--delta``.

    If the noise is given, fewer rounds than ``--rounds`` meet the target: as many as the returned epsilons. ``on_grid``
    gives the cost of a round with the clients' integer noise.

    Raises:
      InvalidInput: a target without noise to solve for or without delta; a sampler that cannot be accounted for; noise
        with which even one round exceeds the target.
    """
    if target_epsilon is None:
        uplink = chain(text, None)
        return uplink, None if delta is None else spent(uplink, delta, rounds, sampler, num_clients, on_grid)
    calls = [call for call in spec.parse(text, "--uplink") if call.name in registry.NOISES]
    if len(calls) != 1:
        raise InvalidInput(
            f"--target_epsilon needs one of {', '.join(f'{name}()' for name in registry.NOISES)} in --uplink: without "
            "a number, to solve for its noise, or with one, to solve for the rounds."
        )
    if delta is None:
        raise InvalidInput("--target_epsilon needs --delta, such as 1e-5.")
    if _given(calls[0]):
        uplink = chain(text, None)
        epsilons = spent(uplink, delta, rounds, sampler, num_clients, on_grid)
        allowed = int(np.sum(epsilons <= target_epsilon))
        if not allowed:
            raise InvalidInput(
                f"--target_epsilon={target_epsilon:g} allows no round, one costs {epsilons[0]:.3g}: take more noise."
            )
        return uplink, epsilons[:allowed]
    unit = chain(text, 1.0)
    allowance = functools.partial(fc.privacy.noise_multiplier, target_epsilon, sampler, num_clients, rounds, delta)
    if unit.promises.noise is fc.uplink.Noise.SERVER:
        z = allowance(mechanism=unit.promises.mechanism)
        *bits, _ = unit.promises.noise_multipliers  # the noise on the updates comes last
        z = fc.privacy.split(z, fc.privacy.together(bits) / 2) if bits else z
    if unit.promises.grid:
        z = allowance(curve=lambda z: on_grid(chain(text, z)))
    uplink = chain(text, z)
    return uplink, spent(uplink, delta, rounds, sampler, num_clients, on_grid)


def protects(uplink: fc.uplink.Uplink, sampler: fc.data.sampling.Sampler, num_clients: int) -> str:
    """The neighbouring relation of the accounting, in words."""
    whole = "one client, all its data in all rounds"
    if sampler.scheme == "uniform" and sampler.cohort_size < num_clients:
        return f"{whole} (replace: another one in its place)"
    if sampler.scheme == "poisson" and not uplink.promises.grid:
        return f"{whole} (add or remove)"
    return f"{whole} (zero out: its updates count as zero)"


def chain(text: str, noise_multiplier: float | None, values: Mapping[str, Any] = spec.NO_VALUES) -> fc.uplink.Uplink:
    """The links of ``--uplink``, with this noise for a link without a number, and the placeholders' values."""
    return fc.uplink.chain(*links(text, noise_multiplier, values))


def links(
    text: str, noise_multiplier: float | None = None, values: Mapping[str, Any] = spec.NO_VALUES
) -> list[fc.uplink.Uplink]:
    """The links of ``--uplink`` one by one.

    Raises:
      InvalidInput: noise without a number, if none is given here.
    """
    for call in spec.parse(text, "--uplink"):
        if noise_multiplier is None and call.name in registry.NOISES and not _given(call):
            raise InvalidInput(
                f"--uplink: {call.name} has no number: write {call.name}(1.0), or let --target_epsilon of "
                "experiments.run solve for it."
            )
    return spec.build(text, registry.uplinks(noise_multiplier), "--uplink", registry.IN_UPLINKS, values)


def _given(call: spec.Call) -> bool:
    """Whether a link of ``registry.NOISES`` has a number."""
    return bool(call.args) or "noise_multiplier" in call.kwargs


def spent(
    uplink: fc.uplink.Uplink,
    delta: float,
    rounds: int,
    sampler: fc.data.sampling.Sampler,
    num_clients: int,
    on_grid: Callable[[fc.uplink.Uplink], Any],
) -> np.ndarray:
    """Epsilon after each round, ``[rounds]``."""
    if uplink.promises.noise not in (fc.uplink.Noise.SERVER, fc.uplink.Noise.SHARES):
        raise InvalidInput(
            "--delta asks for epsilon, but no link of --uplink is noise on the sum: gaussian(1.0), skellam(1.0)."
        )
    central = uplink.promises.noise is fc.uplink.Noise.SERVER
    noise = fc.privacy.together(uplink.promises.noise_multipliers) if central else on_grid(uplink)
    return fc.privacy.epsilons(noise, sampler, num_clients, rounds, delta, uplink.promises.mechanism)


COMPUTABLE = "not private: its noise can be computed from {}"
EXACT = "that nobody else reads the metrics, which are exact (for research: do not publish them)"
WITHHELD = "withheld metrics of the clients' data, as here"


def publishable(text: str) -> Callable[[str], bool]:
    """Which metrics of a row depend on clients' data only through noise, and not on the cohorts.

    These are the round, epsilon, the scores of held-out sets, the size of the server's noise and a threshold that
    follows noised bits. All others are withheld, even a round's seconds, which reveal how many clients took part.

    Args:
      text: the value of ``--uplink``.
    """
    names, thresholds = {"round", "epsilon", "deployment_epsilon"}, []
    for position, call in enumerate(spec.parse(text, "--uplink")):
        if call.name == "gaussian":
            names |= {f"uplink/{position}/noise_std", f"uplink/{position}/noise_cohort"}
        elif call.name == "quantile_clip":
            signature = inspect.signature(registry.UPLINKS[call.name])
            if signature.bind_partial(*call.args, **call.kwargs).arguments.get("bits_noise"):
                thresholds.append(f"uplink/{position}/threshold")
    allowed = ("eval/", *(f"{name}/" for name in thresholds))  # one threshold for each layer
    return lambda name: name in (*names, *thresholds) or name.startswith(allowed)


def claim(
    uplink: fc.uplink.Uplink,
    sampler: fc.data.sampling.Sampler,
    num_clients: int,
    delta: float,
    private_seed: int | None,
    withheld: bool,
    denominator: float | None = None,
    modules: Sequence[str] = (),
) -> dict[str, Any]:
    """The privacy claim of a run, for its ``config.json``; ``statement`` says it in words.

    Args:
      uplink: with the noise.
      sampler: of the cohorts.
      num_clients: N, of the population.
      delta: of epsilon.
      private_seed: the seed of a secret key that is known.
      withheld: whether metrics of clients' data are withheld.
      denominator: of the reducer; noise of a deployment of that size is the run's own.
      modules: those of ``--import``, whose promises the accounting cannot check.
    """
    shares = uplink.promises.noise is fc.uplink.Noise.SHARES
    size, everyone = f"{sampler.cohort_size:g}", sampler.cohort_size >= num_clients
    drawn = {
        "poisson": f"Poisson cohorts of {size} expected",
        "uniform": f"cohorts of {size}",
        "round_robin": f"cohorts of {size}, in turn",
    }.get(sampler.scheme, f"cohorts of {size} ({sampler.scheme.replace('_', ' ')})")
    seen = "everyone who sees the models of all rounds; not from the server, which sees updates and adds the noise"
    if shares:
        seen = "everyone who sees the sums of all rounds but no message, including the server"
        if sampler.scheme != "round_robin" and not everyone:
            seen = "everyone who sees the sums of all rounds, but no message and not who took part, which a server sees"
    return {
        "delta": delta,
        "deployment": None if (of := uplink.promises.deployment) in (None, denominator) else float(of),
        "protects": protects(uplink, sampler, num_clients),
        "from": seen,
        "noise": "the clients' own, a share of each" if shares else "the server's, on each round's sum",
        "cohorts": f"everyone of {num_clients}" if everyone else f"{drawn}, of {num_clients} clients",
        "private_seed": private_seed,
        "withheld": withheld,
        **({"believed": list(modules)} if modules else {}),
    }


def statement(claim: Mapping[str, Any], last: Mapping[str, float], complete: bool) -> list[tuple[str, str]]:
    """The privacy statement of a run: what it protects, from whom, and under which assumptions, as (name, text) lines.

    The terminal ends with it, and the page has it as a table.

    Args:
      claim: from ``claim``, or read back from ``config.json``.
      last: row of the last round.
      complete: whether the run is complete, so that its key is removed.
    """
    spent = last.get("epsilon", last.get("deployment_epsilon", np.nan))
    whose = (
        "of this run"
        if claim["deployment"] is None
        else f"of a deployment with cohorts of {claim['deployment']:g}, whose noise is simulated; NOT of this run"
    )
    if claim["private_seed"] is not None:
        whose = "of a run whose noise nobody can compute; this one is not private"
        key = COMPUTABLE.format(f"--private_seed={claim['private_seed']}")
    elif complete:
        key = "noise and cohorts come from a secret key of 256 bits, which was removed"
    else:
        key = "noise and cohorts come from the secret key in secret.key; keep it secret until the run removes it"
    trusted = (
        "clients that add their noise and keep it secret"
        if "share" in claim["noise"]
        else "a server that adds the noise, and keeps the noise, the cohorts and the updates secret"
    )
    believed = [f"code of {name} that keeps its promises" for name in claim.get("believed", ())]
    return [
        ("epsilon", f"{spent:.3f} at delta {claim['delta']:g}, {whose}"),
        ("protects", claim["protects"]),
        ("from", claim["from"]),
        ("noise", f"{claim['noise']}; {claim['cohorts']}"),
        ("key", key),
        ("assumes", "; ".join([trusted, WITHHELD if claim["withheld"] else EXACT, *believed])),
    ]
