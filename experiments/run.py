"""Trains one federated model and writes a run directory.

  python -m experiments.run
  python -m experiments.run --client="clip_by_global_norm(0.5)|sgd(0.1)" --server="adam(0.01)"
  python -m experiments.run --flagfile=experiments/presets/linear_regression.flags

Components are written as name(arguments), joined by | where several follow each other. Stopped in any way, the
same command goes on where it was.
"""

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from absl import flags

import fedjax_clip as fc
from experiments.config import binary, privacy, registry, rundir, spec, terminal
from experiments.page import page
from fedjax_clip import tasks
from fedjax_clip.core import checks, tree
from fedjax_clip.core.keys import seeded
from fedjax_clip.core.secret import Secret
from fedjax_clip.core.types import InvalidInput, Params, PerExampleLoss
from fedjax_clip.data import speeds
from fedjax_clip.training import identity
from fedjax_clip.uplink.orders import NEEDS_MODULAR_SUM

FLAGS = flags.FLAGS


class WholeOrText(flags.ArgumentParser):
    """A whole number, or text that is read later."""

    def parse(self, argument: Any) -> Any:
        try:
            return int(argument)
        except ValueError:
            return argument


flags.DEFINE_string("task", "digits", f"What to learn: one of {', '.join(registry.TASKS)}; as in npz('my.npz').")
flags.DEFINE_string("algorithm", "fedavg(local_epochs=1)", f"One of {', '.join(registry.ALGORITHMS)}.")
flags.DEFINE_string("client", "clip_by_global_norm(1.0)|sgd(0.1)", "The clients' optimiser, an optax chain.")
flags.DEFINE_string("server", "sgd(1.0)", "The server's optimiser: sgd, fedadam, fedyogi, adam ...")
flags.DEFINE_string("uplink", "", "What an update passes on its way to the server: quantile_clip(0.1), for example.")
flags.DEFINE_string("downlink", "", "How the model is sent to the clients: difference(qsgd(8)) or model(...); whole.")
flags.DEFINE_string(
    "reducer",
    None,
    "weighted_mean (by examples), uniform_mean, fixed_mean, median, bucketing(krum(1), 2) ...; by default the "
    "algorithm's own, fixed_mean under the server's noise, modular_sum behind an integer grid.",
)
flags.DEFINE_float("delta", None, "Writes epsilon so far, of the noise in --uplink at this delta, into each row.")
flags.DEFINE_float(
    "target_epsilon",
    None,
    "Solves for the noise of gaussian(), skellam() or discrete_gaussian() in --uplink, or for the rounds of "
    "gaussian(1.0); needs --delta.",
)
flags.DEFINE_integer(
    "private_seed",
    None,
    "With --delta: draws noise and cohorts from this number, so that a run can be repeated. It is then NOT private. By "
    "default they come from a secret key, which is removed when the run is complete.",
)
flags.DEFINE_enum(
    "private_metrics",
    "withheld",
    ["withheld", "exact"],
    "With --delta: what is written of the clients' data. exact is for research: epsilon does not cover it.",
)
flags.DEFINE_string("sampler", "uniform", f"How cohorts are drawn: {', '.join(registry.SAMPLERS)}.")
flags.DEFINE_integer("cohort_size", None, "Clients a round; by default 8, or all where there are fewer.")
flags.DEFINE(
    WholeOrText(),
    "batch_size",
    20,
    "Examples a local step; 0 takes all of a client's at once; budget(lognormal(), seconds=1, most=20) asks its speed.",
)
flags.DEFINE_enum(
    "compute_dtype", "float32", ["float32", "bfloat16"], "Type of the clients' forward and backward passes."
)
flags.DEFINE_integer("rounds", 150, "Rounds in all.")
flags.DEFINE_enum(
    "non_finite",
    "drop",
    ["drop", "keep", "stop"],
    "What happens to an update with a NaN or an infinity; stop ends the run.",
)
flags.DEFINE_integer(
    "seed", 0, "Seed of the initial parameters, the cohorts, the batches and all noise that need not be private."
)
flags.DEFINE_string("workdir", None, "Run directory; by default one under runs/ named after the configuration.")
flags.DEFINE_integer("eval_every", 10, "Rounds from one evaluation to the next.")
flags.DEFINE_integer("checkpoint_every", 25, "Rounds from one checkpoint to the next.")
flags.DEFINE_integer(
    "rounds_per_dispatch", None, "Rounds sent to the devices at once; by default what a tenth of a second holds."
)
flags.DEFINE_integer(
    "clients_per_chunk", None, "Clients that a device trains at once; by default what is measured best."
)
flags.DEFINE_integer("devices", None, "Devices to use; by default all (on a CPU, one for each core).")

# What the results depend on. More rounds only make a run longer.
IDENTITY = (
    *("task", "algorithm", "client", "server", "uplink", "downlink", "reducer", "sampler", "cohort_size", "batch_size"),
    *("compute_dtype", "seed", "eval_every"),
)


def main() -> None:
    """Builds what the flags say, trains it, and writes its run directory."""
    check_numbers()
    binary.configure_jax(FLAGS.devices)

    task = spec.one(FLAGS.task, registry.TASKS, "--task")
    if FLAGS.delta is not None:
        tasks.refuse_fitted(task)
    sampler = spec.one(FLAGS.sampler, registry.samplers(cohort_size(task)), "--sampler", registry.SPEEDS)
    uplink, epsilons = privacy.build_uplink(
        FLAGS.uplink,
        FLAGS.target_epsilon,
        FLAGS.delta,
        FLAGS.rounds,
        sampler,
        task.data.num_clients,
        lambda uplink: on_grid(uplink, task),
    )
    rounds = FLAGS.rounds if epsilons is None else len(epsilons)
    algorithm, work = build_algorithm(task, uplink, cohort_size(task), task.data.num_clients)
    config = {name: FLAGS[name].value for name in IDENTITY}
    if FLAGS.non_finite != "drop":
        config["non_finite"] = FLAGS.non_finite
    claim, withheld = None, FLAGS.delta is not None and FLAGS.private_metrics == "withheld"
    if FLAGS.delta is not None:
        config |= {"delta": FLAGS.delta, "private_metrics": FLAGS.private_metrics}
        config |= {} if FLAGS.private_seed is None else {"private_seed": FLAGS.private_seed}
        told = sampler, task.data.num_clients, FLAGS.delta, FLAGS.private_seed, withheld
        assert algorithm.parts is not None  # as of all that flags can name
        claim = privacy.claim(uplink, *told, algorithm.parts.reducer.denominator)
    if FLAGS.target_epsilon is not None:
        config |= {"target_epsilon": FLAGS.target_epsilon, "rounds": FLAGS.rounds}
        config["noise_multipliers"] = list(uplink.promises.noise_multipliers)
    workdir = FLAGS.workdir or rundir.default_path(config)
    sets = {name: data for name, data in task.evaluation.items() if not withheld or strangers(data, task.data)}
    held_out = {name: identity.fingerprint(data) for name, data in sets.items()}
    directory = rundir.RunDirectory(workdir, config, rounds, FLAGS["rounds"].present > 0, held_out, claim)

    devices = local_devices()
    params = initial(task, FLAGS.seed)
    tree.flatten_with_names(params)  # says at once if params.npz could not hold them
    directory.about = terminal.describe(task, cohort_size(task), params, devices, withheld)
    for line in (directory.about, directory.extends):
        if line:
            print(line, file=sys.stderr)
    say_what_clips_bound()
    stopping = binary.Stopping()
    shown = privacy.publishable(FLAGS.uplink) if withheld else lambda name: True
    spent = "epsilon" if claim is None or claim["deployment"] is None else "deployment_epsilon"
    noisy = uplink.promises.noise is not None
    with directory:
        if directory.sealed:
            print(f"Complete already ({len(directory.rows())} rounds); remove {directory.path} to run it again.")
            directory.seal()
            page.write(directory.path / "report.html", [directory.path])
            print(terminal.summary(directory, noisy))
            return
        progress = terminal.Progress(rounds)

        def on_round(row: fc.extend.Row) -> None:
            if epsilons is not None:
                row[spent] = float(epsilons[int(row["round"]) - 1])
            row = {name: value for name, value in row.items() if shown(name)}
            directory.add(row)
            progress(row)

        evaluate = fc.extend.client_evaluator(algorithm, task.per_example_loss, task.data, sets, task.summarise)
        try:
            result = fc.train(
                algorithm,
                task.data,
                params,
                rounds=rounds,
                sampler=sampler,
                batch_size=batch_size(),
                seed=FLAGS.seed,
                evaluate_clients=evaluate if sets else None,
                eval_every=FLAGS.eval_every,
                checkpoints=directory.checkpoints,
                checkpoint_every=FLAGS.checkpoint_every,
                on_round=on_round,
                should_stop=stopping,
                devices=devices,
                clients_per_chunk=FLAGS.clients_per_chunk,
                rounds_per_dispatch=FLAGS.rounds_per_dispatch,
                non_finite=FLAGS.non_finite,
                secret=secret(directory),
                **work,
            )
        finally:
            progress.close()

        rows = directory.rows()
        if stopping.signal and rows[-1]["round"] < rounds:
            directory.draw()
            page.write(directory.path / "report.html", [directory.path])
            print(f"Stopped after round {rows[-1]['round']:.0f} of {rounds}; the same command goes on from there.")
            sys.exit(128 + stopping.signal)
        if not result.history:
            print(f"Complete already ({rows[-1]['round']:.0f} rounds); remove {directory.path} to run it again.")
        scores = {} if withheld else client_scores(task, algorithm, result)
        directory.finish(tree.flatten_with_names(result.params), scores)
        directory.seal()
        page.write(directory.path / "report.html", [directory.path])
        print(terminal.summary(directory, noisy))


def secret(directory: rundir.RunDirectory) -> Secret | None:
    """What noise and cohorts are drawn from, if the run claims an epsilon."""
    if FLAGS.delta is None:
        return None
    return directory.secret() if FLAGS.private_seed is None else Secret.of_seed(FLAGS.private_seed)


def strangers(held_out: fc.FederatedData, training: fc.FederatedData) -> bool:
    """Whether no client of a held-out set trains, as far as their names say."""
    names = {training.name(c) for c in range(training.num_clients)}
    return names.isdisjoint(held_out.name(c) for c in range(held_out.num_clients))


MOST: Mapping[str, int] = {  # of more, rows and plans fit into no memory
    "rounds": 10_000_000,
    "eval_every": 2**31 - 1,
    "checkpoint_every": 2**31 - 1,
    "rounds_per_dispatch": 10_000,
    "devices": binary.MOST_DEVICES,
    "cohort_size": 2**31 - 1,
    "clients_per_chunk": 2**20,
}


def say_what_clips_bound() -> None:
    """Says of each clip behind an optimiser that it bounds steps, on stderr."""
    for flag in ("--client", "--server"):
        for name in registry.behind_optimizer(str(FLAGS[flag[2:]].value), flag):
            print(
                f"{flag}: {name} stands behind the optimiser and bounds its steps; to clip gradients put it in front.",
                file=sys.stderr,
            )


def check_numbers() -> None:
    """Refuses numbers that no run can have."""
    for name, most in MOST.items():
        if FLAGS[name].value is not None:
            checks.count(f"--{name}", FLAGS[name].value, most=most)
    batch_size()
    checks.seed("--seed", FLAGS.seed)
    for name in ("private_seed", "private_metrics"):
        if FLAGS[name].present and FLAGS.delta is None:
            raise InvalidInput(f"--{name} is for runs that claim an epsilon: give --delta, too.")
    if FLAGS.private_seed is not None:
        checks.seed("--private_seed", FLAGS.private_seed)


def build_algorithm(
    task: tasks.Task,
    uplink: fc.uplink.Uplink,
    cohort_size: int,
    num_clients: Any,
    values: Mapping[str, Any] = spec.NO_VALUES,
) -> tuple[fc.extend.Algorithm, dict[str, Any]]:
    """The algorithm that the flags say, and how much its clients train.

    Args:
      task: what to learn.
      uplink: what ``--uplink`` says.
      cohort_size: clients a round.
      num_clients: N, of the population.
      values: of the flags' placeholders.
    """
    make_algorithm, work = spec.one(FLAGS.algorithm, registry.ALGORITHMS, "--algorithm", registry.BUDGETS, values)
    reduced = FLAGS.compute_dtype != "float32"
    loss = fc.local.mixed_precision(task.per_example_loss, FLAGS.compute_dtype) if reduced else task.per_example_loss

    def build(loss: PerExampleLoss) -> fc.extend.Algorithm:
        algorithm = make_algorithm(
            loss,
            registry.client_tx(FLAGS.client, values),
            registry.server_tx(FLAGS.server, values),
            uplink=uplink,
            reducer=build_reducer(uplink, cohort_size),
            num_clients=num_clients,
        )
        if not FLAGS.downlink:
            return algorithm
        return spec.one(FLAGS.downlink, registry.DOWNLINKS, "--downlink", registry.COMPRESSORS, values)(algorithm)

    return build(loss) if task.frozen is None else fc.partially_frozen(build, loss, task.frozen), work


def local_devices() -> list[jax.Device]:
    """As many devices as ``--devices`` says, or all."""
    found = jax.local_devices()
    if (FLAGS.devices or 0) > len(found):
        raise InvalidInput(f"--devices={FLAGS.devices} is more than there are: {len(found)} of {found[0].platform}.")
    return found[: FLAGS.devices]


def initial(task: tasks.Task, seed: int) -> Params:
    """The initial parameters, on the host, if the machine can hold them: XLA would end the process."""
    key = seeded(seed)
    needed = tree.nbytes(jax.eval_shape(task.init, key))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise InvalidInput(
            f"--task: the model has {needed / 2**30:,.0f} GiB of parameters, and the machine {memory / 2**30:,.0f} GiB "
            "of memory."
        )
    return jax.tree.map(np.asarray, task.init(key))


def batch_size() -> int | speeds.BatchSizes | None:
    """What ``--batch_size`` says."""
    value: Any = FLAGS.batch_size
    if isinstance(value, str):
        return spec.one(value, registry.BATCH_SIZES, "--batch_size", registry.SPEEDS)
    if value < 0:
        raise InvalidInput(f"--batch_size must not be negative, and is {value}.")
    return value or None


def build_reducer(uplink: fc.uplink.Uplink, cohort_size: int) -> fc.reduce.Reducer | None:
    """What ``--reducer`` says, or what the uplink needs; ``None`` leaves it to the algorithm."""
    text = FLAGS.reducer or registry.needed_reducer(uplink)
    if not text:
        return None
    reducers = registry.reducers(cohort_size)
    reducer = spec.one(text, reducers, "--reducer", reducers)
    if reducer.fewest > cohort_size:
        raise InvalidInput(f"--reducer={text} needs at least {reducer.fewest} clients in a round, not {cohort_size}.")
    return reducer


def on_grid(uplink: fc.uplink.Uplink, task: tasks.Task) -> Callable[..., Any]:
    """What the clients' noise on an integer grid costs a round."""
    reducer = build_reducer(uplink, cohort_size(task))
    if reducer is None or reducer.threshold is None:
        raise InvalidInput(NEEDS_MODULAR_SUM)
    algorithm, _ = build_algorithm(task, uplink, cohort_size(task), task.data.num_clients)
    params = jax.eval_shape(task.init, seeded(0))
    sent = terminal.trained(task, params)
    if algorithm.personal is not None:  # what clients keep is not sent
        kept = jax.eval_shape(algorithm.init_client, params).own
        sent = np.empty(tree.size(sent) - tree.size(kept), np.float32)
    return fc.privacy.distributed(uplink, sent, reducer)


def cohort_size(task: tasks.Task) -> int:
    """What ``--cohort_size`` says, or 8, or everyone."""
    if (FLAGS.cohort_size or 0) > task.data.num_clients:
        raise InvalidInput(
            f"--cohort_size={FLAGS.cohort_size} is more than the {task.data.num_clients} training clients."
        )
    return FLAGS.cohort_size or min(8, task.data.num_clients)


def client_scores(task: tasks.Task, algorithm: fc.extend.Algorithm, result: fc.Result) -> dict[str, np.ndarray]:
    """``{"set/metric": [M]}`` of each held-out set; ``set/client`` are the names, ``set/examples`` the sizes."""
    score = fc.extend.per_client(task.per_example_loss, task.evaluation, algorithm=algorithm, population=task.data)
    scores = score(result.params, result.state.clients)
    for name, data in task.evaluation.items():
        scores[f"{name}/client"] = np.array([data.name(c) for c in range(data.num_clients)])
        scores[f"{name}/examples"] = data.sizes
    return scores


if __name__ == "__main__":
    binary.run(main, __doc__ or "", registry.describe)
