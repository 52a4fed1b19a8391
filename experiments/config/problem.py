"""The flags that a run, a sweep and an audit share, and what they build."""

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

import fedjax_clip as fc
from experiments.config import binary, distributed, optimisers, outside, own_scores, privacy, registry, spec, terminal
from fedjax_clip import tasks
from fedjax_clip.algorithms import averaging
from fedjax_clip.core import checks, tree
from fedjax_clip.core.keys import seeded
from fedjax_clip.core.types import InvalidInput, Params
from fedjax_clip.training.evaluation import Evaluator
from fedjax_clip.uplink.orders import NEEDS_MODULAR_SUM

FLAGS = flags.FLAGS


class NumberOrText(flags.ArgumentParser):
    """A number, or text that is read later."""

    def parse(self, argument: Any) -> Any:
        for kind in (int, float):
            try:
                return kind(argument)
            except ValueError:
                pass
        return argument


flags.DEFINE_string("task", "digits", f"What to learn: one of {', '.join(registry.TASKS)}; as in npz('my.npz').")
flags.DEFINE_string("algorithm", "fedavg", f"The federated algorithm: one of {', '.join(registry.ALGORITHMS)}.")
flags.DEFINE_integer("local_epochs", None, "Passes of a client over its examples in a round; by default 1.")
flags.DEFINE(
    NumberOrText(),
    "local_steps",
    None,
    "Steps of a client in a round, in place of --local_epochs. With budget(lognormal(), seconds=10, most=20) each "
    "client takes as many as its speed allows.",
)
flags.DEFINE(
    NumberOrText(),
    "batch_size",
    20,
    "Examples in a local step; 0 takes all examples of a client. With budget(lognormal(), seconds=1, most=20) each "
    "client takes as many as its speed allows.",
)
flags.DEFINE_string("client", "clip_by_global_norm(1.0)|sgd(0.1)", "The clients' optimiser, an optax chain.")
flags.DEFINE_string("server", "sgd(1.0)", "The server's optimiser: sgd, fedadam, fedyogi, adam ...")
flags.DEFINE_string(
    "uplink", "", "How a client's update travels to the server: clips, compression and noise, joined by |."
)
flags.DEFINE_string(
    "downlink", "", "How the model travels to the clients: difference(qsgd(8)) or model(qsgd(8)); by default whole."
)
flags.DEFINE_string(
    "reducer",
    None,
    "How the server combines the updates: weighted_mean (by examples), uniform_mean, fixed_mean, median, "
    "bucketing(krum(1), 2) ... By default the algorithm's own; fixed_mean if the server adds noise; modular_sum if the "
    "uplink has an integer grid.",
)
flags.DEFINE_float("delta", None, "Computes epsilon of the noise in --uplink at this delta after each round.")
flags.DEFINE_float(
    "target_epsilon",
    None,
    "Needs --delta. Finds the noise of gaussian(), skellam() or discrete_gaussian() in --uplink that ends at this "
    "epsilon, or the number of rounds of gaussian(1.0).",
)
flags.DEFINE_integer(
    "private_seed",
    None,
    "Needs --delta. Draws noise and cohorts from this number, so that the run can be repeated. The run is then NOT "
    "private. By default they come from a secret key, which is removed at the end of the run.",
)
flags.DEFINE_enum(
    "private_metrics",
    "withheld",
    ["withheld", "exact"],
    "Needs --delta. Whether metrics of the clients' data are written. exact is for research: epsilon does not cover "
    "them.",
)
flags.DEFINE_string("sampler", "uniform", f"How cohorts are drawn: {', '.join(registry.SAMPLERS)}.")
flags.DEFINE_integer("cohort_size", None, "Clients in a round; by default 8, or all if there are fewer.")
flags.DEFINE_enum(
    "compute_dtype", "float32", ["float32", "bfloat16"], "Type of the clients' forward and backward passes."
)
flags.DEFINE_string(
    "scores",
    "",
    "Scores of held-out sets by functions of --import's, (values, data) -> {name: number}: my_module.gini(), joined by "
    "|.",
)
flags.DEFINE_integer("rounds", 150, "Number of rounds.")
flags.DEFINE_enum(
    "non_finite",
    "drop",
    ["drop", "keep", "stop"],
    "What happens to an update that contains NaN or infinity; stop ends the run.",
)
flags.DEFINE_integer(
    "seed", 0, "Seed of the initial parameters, the cohorts, the batches and all noise that need not be private."
)
flags.DEFINE_string("workdir", None, "Run directory; by default one under runs/ named after the configuration.")
flags.DEFINE_string(
    "metric",
    None,
    "The score that decides, such as examples/auroc_worst. A run keeps the model that is best by it in best.npz. A "
    "sweep compares points by it; by default by the accuracy, if there is one, or the loss.",
)
flags.DEFINE_integer("eval_every", 10, "Rounds between evaluations.")
flags.DEFINE_integer("checkpoint_every", 25, "Rounds between checkpoints.")
flags.DEFINE_integer(
    "rounds_per_dispatch", None, "Rounds sent to the devices at once; by default as many as take 0.1 seconds."
)
flags.DEFINE_integer(
    "clients_per_chunk", None, "Clients that a device trains at once; by default by the model's size and the platform."
)
flags.DEFINE_integer("devices", None, "Devices to use; by default all (on a CPU, one for each core).")
distributed.define_flag()
outside.define_flag()

MOST: Mapping[str, int] = {  # larger numbers need rows and plans that do not fit in memory
    "rounds": 10_000_000,
    "eval_every": 2**31 - 1,
    "checkpoint_every": 2**31 - 1,
    "rounds_per_dispatch": 10_000,
    "devices": binary.MOST_DEVICES,
    "cohort_size": 2**31 - 1,
    "clients_per_chunk": 2**20,
    "local_epochs": 2**31 - 1,
}


class Problem(NamedTuple):
    """The problem of the flags: task, cohorts and uplink.

    Attributes:
      epsilons: after each round, ``[rounds]``, if there is a ``--delta``.
    """

    task: tasks.Task
    cohort_size: int
    sampler: Any
    uplink: fc.uplink.Uplink
    epsilons: np.ndarray | None


def read() -> Problem:
    """The problem that the flags describe."""
    task = read_task()
    size = cohort_size(task)
    drawn = sampler(size)
    uplink, epsilons = privacy.build_uplink(
        *(FLAGS.uplink, FLAGS.target_epsilon, FLAGS.delta, FLAGS.rounds, drawn, task.data.num_clients),
        lambda uplink: on_grid(uplink, task),
    )
    return Problem(task, size, drawn, uplink, epsilons)


def read_task() -> tasks.Task:
    """The task of ``--task``, with the scores of ``--scores``."""
    return own_scores.added(spec.one(FLAGS.task, registry.TASKS, "--task"), FLAGS.scores)


def check_numbers() -> None:
    """Refuses numbers out of range."""
    for name, most in MOST.items():
        if FLAGS[name].value is not None:
            checks.count(f"--{name}", FLAGS[name].value, most=most)
    local_work()
    checks.seed("--seed", FLAGS.seed)
    for name in ("private_seed", "private_metrics"):
        if FLAGS[name].present and FLAGS.delta is None:
            raise InvalidInput(f"--{name} is for runs that claim an epsilon: give --delta, too.")
    if FLAGS.private_seed is not None:
        checks.seed("--private_seed", FLAGS.private_seed)


def config(names: Iterable[str]) -> dict[str, Any]:
    """The values of these flags, for ``config.json``, and the modules of ``--import``."""
    found = {name: FLAGS[name].value for name in names}
    if FLAGS.local_steps is None:
        found["local_epochs"] = FLAGS.local_epochs or 1
    found |= {"scores": FLAGS.scores} if FLAGS.scores else {}
    return found | ({"import": ",".join(outside.modules())} if outside.modules() else {})


def cohort_size(task: tasks.Task) -> int:
    """``--cohort_size``, or 8, or all clients if there are fewer."""
    if (FLAGS.cohort_size or 0) > task.data.num_clients:
        raise InvalidInput(
            f"--cohort_size={FLAGS.cohort_size} is more than the {task.data.num_clients} training clients."
        )
    return FLAGS.cohort_size or min(8, task.data.num_clients)


def sampler(cohort_size: int) -> Any:
    """The sampler of ``--sampler``."""
    return spec.one(FLAGS.sampler, registry.samplers(cohort_size), "--sampler", registry.SPEEDS)


def local_work() -> dict[str, Any]:
    """The local work of a client in a round, as arguments of ``fc.train`` and ``fc.sweep``."""
    if FLAGS.local_epochs is not None and FLAGS.local_steps is not None:
        raise InvalidInput("--local_epochs and --local_steps exclude each other: give one of them.")
    batch_size, steps = FLAGS.batch_size, FLAGS.local_steps
    if isinstance(batch_size, str):
        batch_size = spec.one(batch_size, registry.BATCH_SIZES, "--batch_size", registry.SPEEDS)
    else:
        batch_size = checks.count("--batch_size", batch_size, 0) or None
    if isinstance(steps, str):
        steps = spec.one(steps, registry.STEPS, "--local_steps", registry.SPEEDS)
    elif steps is not None:
        steps = checks.count("--local_steps", steps)
    return {"batch_size": batch_size, "local_epochs": FLAGS.local_epochs or 1, "local_steps": steps}


def build_algorithm(
    task: tasks.Task,
    uplink: fc.uplink.Uplink,
    cohort_size: int,
    values: Mapping[str, Any] = spec.NO_VALUES,
) -> fc.extend.Algorithm:
    """The algorithm that the flags describe.

    Args:
      task: the task.
      uplink: of ``--uplink``.
      cohort_size: clients a round.
      values: of the flags' placeholders.
    """
    reduced = FLAGS.compute_dtype != "float32"
    loss = fc.local.mixed_precision(task.per_example_loss, FLAGS.compute_dtype) if reduced else task.per_example_loss
    build = builder(task, uplink, build_reducer(uplink, cohort_size), values)
    return build(loss, optimisers.client_tx(FLAGS.client, values), optimisers.server_tx(FLAGS.server, values))


def builder(
    task: tasks.Task,
    uplink: fc.uplink.Uplink,
    reducer: fc.reduce.Reducer | None,
    values: Mapping[str, Any] = spec.NO_VALUES,
) -> Callable[..., fc.extend.Algorithm]:
    """``(loss, client_tx, server_tx, **options) -> algorithm``, with all other parts from the flags."""
    make = spec.one(FLAGS.algorithm, registry.ALGORITHMS, "--algorithm", registry.ALGORITHMS, values)
    for flag, part in (("server", "server_tx"), ("uplink", "uplink"), ("reducer", "reducer")):
        if FLAGS[flag].value != FLAGS[flag].default and not make.takes(part):
            raise InvalidInput(f"--{flag}: {FLAGS.algorithm} has no argument {part}: leave --{flag} out.")
    if make.make is fc.fedsgd and (FLAGS.local_epochs or 1, FLAGS.local_steps or 1) != (1, 1):
        raise InvalidInput("--algorithm=fedsgd takes one local step: leave --local_epochs and --local_steps out.")

    def build(loss: Any, client_tx: Any, server_tx: Any, **options: Any) -> fc.extend.Algorithm:
        algorithm = make(loss, client_tx, server_tx, **{"uplink": uplink, "reducer": reducer, **options})
        if FLAGS.downlink:
            wrap = spec.one(FLAGS.downlink, registry.DOWNLINKS, "--downlink", registry.COMPRESSORS, values)
            algorithm = wrap(algorithm)
        return algorithm if task.frozen is None else fc.partially_frozen(algorithm, task.frozen)

    return build


def build_reducer(uplink: fc.uplink.Uplink, cohort_size: int) -> fc.reduce.Reducer | None:
    """The reducer of ``--reducer``, or the one that the uplink needs; ``None`` leaves it to the algorithm."""
    text = FLAGS.reducer or registry.needed_reducer(uplink)
    if not text:
        return None
    reducers = registry.reducers(cohort_size)
    reducer = spec.one(text, reducers, "--reducer", reducers)
    if reducer.fewest > cohort_size:
        raise InvalidInput(f"--reducer={text} needs at least {reducer.fewest} clients in a round, not {cohort_size}.")
    return reducer


def on_grid(uplink: fc.uplink.Uplink, task: tasks.Task) -> Callable[..., Any]:
    """The cost of a round with the clients' noise on an integer grid."""
    reducer = build_reducer(uplink, cohort_size(task))
    if reducer is None or reducer.threshold is None:
        raise InvalidInput(NEEDS_MODULAR_SUM)
    algorithm = build_algorithm(task, uplink, cohort_size(task))
    params = jax.eval_shape(task.init, seeded(0))
    sent = terminal.trained(task, params)
    if algorithm.personal is not None:  # private parameters are not sent
        kept = jax.eval_shape(algorithm.init_client, params).private
        sent = np.empty(tree.size(sent) - tree.size(kept), np.float32)
    return fc.privacy.distributed(uplink, sent, reducer)


def local_devices() -> list[jax.Device]:
    """``--devices`` devices of this process, or all."""
    found = jax.local_devices()
    if (FLAGS.devices or 0) > len(found):
        raise InvalidInput(f"--devices={FLAGS.devices} is more than there are: {len(found)} of {found[0].platform}.")
    return found[: FLAGS.devices]


def devices() -> list[jax.Device]:
    """The ``local_devices`` of all processes, in their order."""
    if distributed.alone():
        return local_devices()
    own = [jax.local_devices().index(device) for device in local_devices()]
    everyone = [[d for d in jax.devices() if d.process_index == p] for p in range(jax.process_count())]
    return [found[i] for found in everyone for i in own if i < len(found)]


def told() -> dict[str, str]:
    """What all processes must have been told alike: their flags."""
    own = {"distributed", "devices"}  # of each process; the devices' numbers are compared elsewhere
    project = flags.FLAGS.flags_by_module_dict()
    names = [f.name for module in (__name__, outside.__name__, sys.argv[0]) for f in project.get(module, [])]
    return {f"--{name}": str(FLAGS[name].value) for name in names if name not in own}


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


def say_what_clips_bound() -> None:
    """Warns on stderr of each clip after an optimiser, since it bounds steps, not gradients."""
    for flag in ("--client", "--server"):
        for name in optimisers.behind_optimizer(str(FLAGS[flag[2:]].value), flag):
            print(
                f"{flag}: {name} stands behind the optimiser and bounds its steps; to clip gradients put it in front.",
                file=sys.stderr,
            )


def evaluator(
    task: tasks.Task,
    algorithm: fc.extend.Algorithm,
    sets: Mapping[str, fc.FederatedData],
    split: fc.placement.Mesh | None = None,
) -> Evaluator:
    """An evaluator on these held-out sets, with the task's own scores; each client uses its own model."""
    own: dict[str, Any] = {"algorithm": algorithm, "population": task.data, "summarise": task.summarise}
    own |= {"devices": split, "batch_size": task.evaluated_at_once}
    return fc.evaluator(task.per_example_loss, sets, **own)


def scores(
    task: tasks.Task, sets: Mapping[str, fc.FederatedData], algorithm: fc.extend.Algorithm | None = None
) -> list[str]:
    """The names of the scores on these held-out sets, as rows have them; those of the server's average model, too."""
    params = jax.eval_shape(task.init, seeded(0))
    evaluate = fc.evaluator(task.per_example_loss, sets, summarise=task.summarise)
    names = [f"eval/{name}" for name in evaluate.names(params)]
    server = None if algorithm is None else jax.eval_shape(algorithm.init, params)
    averaged = averaging.average_of(server) is not None
    return names + [averaging.renamed(name) for name in names] * averaged
