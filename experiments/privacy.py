"""The uplink that flags ask for, and what its noise is worth."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

import fedjax_clip as fc
from experiments import registry, spec
from fedjax_clip.typing import InvalidInput


def build_uplink(
    text: str,
    target_epsilon: float | None,
    delta: float | None,
    rounds: int,
    sampler: fc.sampling.Sampler,
    num_clients: int,
    on_grid: Callable[[fc.Uplink], Any],
) -> tuple[fc.Uplink, np.ndarray | None]:
    """``--uplink``, with the noise that ``--target_epsilon`` allows, and epsilon by round if there is a ``--delta``.

    If the noise is given, the target is met by fewer rounds than ``--rounds``: as many as epsilons come back.
    ``on_grid`` says what noise that the clients add as integers costs a round.

    Raises:
      InvalidInput: a target without noise to solve for or without delta; a sampler that cannot be accounted for; noise
        with which not even one round meets the target.
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


def protects(uplink: fc.Uplink, sampler: fc.sampling.Sampler, num_clients: int) -> str:
    """What epsilon is for: what neighbours differ in, as the accounting has them."""
    if uplink.promises.grid:
        return "one client's data, from who sees sums only"
    replaced = sampler.scheme == "uniform" and sampler.cohort_size < num_clients
    return "one client's data, in another's place" if replaced else "one client's presence"


def chain(text: str, noise_multiplier: float | None, values: Mapping[str, Any] = spec.NO_VALUES) -> fc.Uplink:
    """The links of ``--uplink``, with this noise for one without a number, and the values of its placeholders."""
    return fc.uplink.chain(*links(text, noise_multiplier, values))


def links(
    text: str, noise_multiplier: float | None = None, values: Mapping[str, Any] = spec.NO_VALUES
) -> list[fc.Uplink]:
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
    """Whether a link of ``registry.NOISES`` says how much."""
    return bool(call.args) or "noise_multiplier" in call.kwargs


def spent(
    uplink: fc.Uplink,
    delta: float,
    rounds: int,
    sampler: fc.sampling.Sampler,
    num_clients: int,
    on_grid: Callable[[fc.Uplink], Any],
) -> np.ndarray:
    """Epsilon after each round, ``[rounds]``."""
    if uplink.promises.noise not in (fc.uplink.Noise.SERVER, fc.uplink.Noise.SHARES):
        raise InvalidInput(
            "--delta asks for epsilon, but no link of --uplink is noise on the sum: gaussian(1.0), skellam(1.0)."
        )
    central = uplink.promises.noise is fc.uplink.Noise.SERVER
    noise = fc.privacy.together(uplink.promises.noise_multipliers) if central else on_grid(uplink)
    return fc.privacy.epsilons(noise, sampler, num_clients, rounds, delta, uplink.promises.mechanism)
