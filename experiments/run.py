"""Trains one federated model and writes a run directory.

  python -m experiments.run
  python -m experiments.run --client="clip_by_global_norm(0.5)|sgd(0.1)" --server="adam(0.01)"
  python -m experiments.run --flagfile=experiments/presets/linear_regression.flags
  python -m experiments.run --import=my_module --algorithm="my_module.fedexp()"

Components are written as name(arguments), joined by | where several follow each other. If a run is stopped in any way,
the same command resumes it.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

import fedjax_clip as fc
from experiments.config import binary, origin, outside, privacy, problem, registry, rundir, terminal, tracking
from experiments.page import page
from fedjax_clip import tasks
from fedjax_clip.algorithms.averaging import average_of
from fedjax_clip.core import checks, tree
from fedjax_clip.core.secret import Secret
from fedjax_clip.core.types import InvalidInput
from fedjax_clip.training import identity, metric
from fedjax_clip.training.best import enough
from fedjax_clip.training.processes import Processes

FLAGS = flags.FLAGS
flags.DEFINE_integer(
    "patience", None, "Needs --metric. Training ends after so many evaluations in a row without a better value."
)
flags.DEFINE_integer("model_parallel", 1, "Devices over which each model is split, if it is too large for one.")
flags.DEFINE_string(
    "sinks",
    "",
    "Where rows go besides the run directory, joined by |: wandb('project'), mlflow('sqlite:///mlflow.db'), "
    "tensorboard('directory').",
)

# What the results depend on. More rounds only make a run longer.
IDENTITY = (
    *("task", "algorithm", "local_epochs", "local_steps", "batch_size", "client", "server", "uplink", "downlink"),
    *("reducer", "sampler", "cohort_size", "compute_dtype", "seed", "eval_every"),
)


def main() -> None:
    """Builds the run of the flags, trains it, and writes its run directory."""
    check_flags()
    binary.configure_jax(FLAGS.devices, FLAGS.distributed)
    devices = problem.devices()
    processes = Processes(devices)
    processes.agree(problem.told())
    with processes.together():
        outside.load()
        split = splitting(devices)
        sinks = tracking.read(FLAGS.sinks)
        asked = problem.read()
        task, uplink, epsilons = asked.task, asked.uplink, asked.epsilons
        rounds = FLAGS.rounds if epsilons is None else len(epsilons)
        algorithm = problem.build_algorithm(task, uplink, asked.cohort_size)

        params = problem.initial(task, FLAGS.seed)
        tree.flatten_with_names(params)  # fails now if params.npz could not hold them
        best, begin = keeping(task), origin.read(algorithm, params)
        if best is not None:
            metric.named(best.metric, problem.scores(task, task.evaluation, algorithm))
        withheld = FLAGS.delta is not None and FLAGS.private_metrics == "withheld"
        claim = None if FLAGS.delta is None else claimed(asked, algorithm, withheld)
        config = configuration(uplink)
        sets = {name: data for name, data in task.evaluation.items() if not withheld or strangers(data, task.data)}
        held_out = {name: identity.fingerprint(data) for name, data in sets.items()}
        workdir = FLAGS.workdir or rundir.default_path(config)
        opened = rundir.Follower if processes.number else rundir.RunDirectory
        explicit = FLAGS["rounds"].present > 0
        directory = opened(workdir, config, rounds, explicit, held_out, claim, processes, begin.record, begin.rows)
        directory.about = terminal.describe(task, asked.cohort_size, params, split or devices, withheld)
    for line in (directory.about, directory.extends):
        if line:
            print(line, file=sys.stderr)
    problem.say_what_clips_bound()
    stopping = binary.Stopping()
    with directory:
        if processes.first(directory.sealed):
            with processes.together():
                if processes.number == 0:
                    print(
                        f"Complete already ({len(directory.rows())} rounds); remove {directory.path} to run it again."
                    )
                    end(directory, uplink)
            return
        progress = fc.sinks.progress(rounds, FLAGS.metric)
        tracked = tracking.Tracking({} if processes.number else sinks, directory, late=withheld)
        shown = privacy.publishable(FLAGS.uplink) if withheld else lambda name: True
        spent = "epsilon" if claim is None or claim["deployment"] is None else "deployment_epsilon"

        def on_round(row: fc.extend.Row) -> None:
            if epsilons is not None:
                row[spent] = float(epsilons[int(row["round"]) - 1])
            row = {name: value for name, value in row.items() if shown(name)}
            if "went_on_from" in row:
                print(begin.sentence(row), file=sys.stderr)
            directory.add(row)
            tracked(row)
            progress(row)

        evaluate = problem.evaluator(task, algorithm, sets, split)
        with progress, tracked:
            result = fc.train(
                algorithm,
                task.data,
                begin.params,
                rounds=rounds,
                sampler=asked.sampler,
                **problem.local_work(),
                seed=FLAGS.seed,
                evaluate=evaluate if sets else None,
                eval_every=FLAGS.eval_every,
                checkpoints=directory.checkpoints,
                checkpoint_every=FLAGS.checkpoint_every,
                on_round=on_round if processes.number == 0 else None,
                should_stop=stopping,
                devices=split or devices,
                clients_per_chunk=FLAGS.clients_per_chunk,
                rounds_per_dispatch=FLAGS.rounds_per_dispatch,
                non_finite=FLAGS.non_finite,
                secret=secret(directory),
                state=begin.state,
                best=best,
            )

        done = result.state.rounds
        ended = done == rounds or enough(best, result.state.best)
        stopped = int(processes.most(stopping.signal or 0))  # a process that had no signal stops with the others
        scores = {} if withheld or not ended else client_scores(task, algorithm, result, split)
        with processes.together():
            if processes.number == 0:
                model = task.predictor if algorithm.personal is None else None  # else each client has its own
                if ended and task.samples is not None:
                    directory.keep_samples(*(told(task.samples, x) for x in (begin.params, result.params)))
                if ended and task.save is not None and not (directory.path / "model").exists():
                    task.save(result.params, directory.path / "model")
                finish(directory, uplink, result, scores, rounds if ended else done, rounds, model)
        if not ended:
            sys.exit(128 + stopped)


def told(samples: Callable[[Any], Sequence[tasks.Sample]], params: Any) -> list[dict[str, str]]:
    """What the model of these parameters answers."""
    return [sample._asdict() for sample in samples(params)]


def finish(
    directory: rundir.RunDirectory,
    uplink: fc.uplink.Uplink,
    result: fc.Result,
    scores: dict[str, np.ndarray],
    done: int,
    rounds: int,
    model: tasks.Predictor | None = None,
) -> None:
    """Writes what a run leaves when it is complete, or when it was stopped after ``done`` of its ``rounds``."""
    if done < rounds:
        directory.draw()
        page.write(directory.path / "report.html", [directory.path])
        print(f"Stopped after round {done} of {rounds}; the same command goes on from there.")
        return
    if not result.history:
        say_complete(directory)
    directory.finish(tree.flatten_with_names(result.params), scores, *beside(result), model)
    if model is not None:
        fc.export.safetensors(tasks.Model(model, result.params), directory.path / "model.safetensors")
    end(directory, uplink)


def check_flags() -> None:
    """Refuses flags that contradict each other, before the data is read."""
    problem.check_numbers()
    origin.check()
    checks.count("--model_parallel", FLAGS.model_parallel, most=binary.MOST_DEVICES)
    if FLAGS.patience is not None:
        checks.count("--patience", FLAGS.patience)
        if FLAGS.metric is None:
            raise InvalidInput("--patience waits for a better value of a metric: give --metric, too.")
    if FLAGS.metric is not None and FLAGS.delta is not None:
        raise InvalidInput(
            "--metric: which round is best, and when training ends, tells of held-out data, which the epsilon of "
            "--delta does not cover: leave one of them out."
        )


def keeping(task: tasks.Task) -> fc.extend.Best | None:
    """The best model to keep, as ``--metric`` and ``--patience`` ask."""
    if FLAGS.metric is None:
        return None
    if not task.evaluation:
        raise InvalidInput(f"--metric: {FLAGS.task} holds nothing out, so no model can be compared: leave it out.")
    return fc.extend.Best(FLAGS.metric, FLAGS.patience)


def beside(result: fc.Result) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, Any] | None]:
    """The best and the average model, by the names of their files, and what the best one is."""
    found, told = {}, None
    if result.best is not None:
        found["best"] = tree.flatten_with_names(result.best.params)
        told = {"metric": FLAGS.metric, "value": float(result.best.value), "round": int(result.best.round)}
    if average_of(result.state.server) is not None:
        found["average"] = tree.flatten_with_names(fc.fedopt.averaged(result.state.server))
    return found, told


def say_complete(directory: rundir.RunDirectory) -> None:
    """Says that no round was left."""
    print(f"Complete already ({len(directory.rows())} rounds); remove {directory.path} to run it again.")


def end(directory: rundir.RunDirectory, uplink: fc.uplink.Uplink) -> None:
    """Seals the directory of a complete run, writes its page, and says how it ended."""
    directory.seal()
    page.write(directory.path / "report.html", [directory.path])
    print(terminal.summary(directory, noisy=uplink.promises.noise is not None))


def configuration(uplink: fc.uplink.Uplink) -> dict[str, Any]:
    """All that the results depend on, for ``config.json``."""
    config = problem.config(IDENTITY)
    if FLAGS.non_finite != "drop":
        config["non_finite"] = FLAGS.non_finite
    config |= {name: FLAGS[name].value for name in ("init", "init_params", "metric") if FLAGS[name].value is not None}
    if FLAGS.delta is not None:
        config |= {"delta": FLAGS.delta, "private_metrics": FLAGS.private_metrics}
        config |= {} if FLAGS.private_seed is None else {"private_seed": FLAGS.private_seed}
    if FLAGS.target_epsilon is not None:
        config |= {"target_epsilon": FLAGS.target_epsilon, "rounds": FLAGS.rounds}
        config["noise_multipliers"] = list(uplink.promises.noise_multipliers)
    return config


def claimed(asked: problem.Problem, algorithm: fc.extend.Algorithm, withheld: bool) -> dict[str, Any]:
    """The privacy claim of a run with ``--delta``."""
    tasks.refuse_fitted(asked.task)
    if algorithm.parts is None:
        raise InvalidInput(
            f"--delta: {FLAGS.algorithm} does not say what its clients send: give its Algorithm parts=..., an "
            "fc.extend.Parts."
        )
    told = asked.sampler, asked.task.data.num_clients, FLAGS.delta, FLAGS.private_seed, withheld
    return privacy.claim(asked.uplink, *told, algorithm.parts.reducer.denominator, outside.modules())


def secret(directory: rundir.RunDirectory) -> Secret | None:
    """The secret of noise and cohorts, if the run claims an epsilon."""
    if FLAGS.delta is None:
        return None
    return directory.secret() if FLAGS.private_seed is None else Secret.of_seed(FLAGS.private_seed)


def splitting(devices: Sequence[jax.Device]) -> fc.placement.Mesh | None:
    """The mesh that ``--model_parallel`` asks for; ``None`` if every device has a whole model."""
    if FLAGS.model_parallel == 1:
        return None
    if len(devices) % FLAGS.model_parallel:
        raise InvalidInput(
            f"--model_parallel={FLAGS.model_parallel} must divide the number of devices, {len(devices)}: give another "
            "number, or other --devices."
        )
    return fc.placement.mesh(model=FLAGS.model_parallel, devices=devices)


def strangers(held_out: fc.FederatedData, training: fc.FederatedData) -> bool:
    """Whether no client of a held-out set trains, by their names."""
    names = {training.name(c) for c in range(training.num_clients)}
    return names.isdisjoint(held_out.name(c) for c in range(held_out.num_clients))


def client_scores(
    task: tasks.Task, algorithm: fc.extend.Algorithm, result: fc.Result, split: fc.placement.Mesh | None
) -> dict[str, np.ndarray]:
    """``{"set/metric": [M]}`` of each held-out set; ``set/client`` are the names, ``set/examples`` the sizes."""
    evaluate = problem.evaluator(task, algorithm, task.evaluation, split)
    scores = evaluate.per_client(result.params, result.state.clients)
    for name, data in task.evaluation.items():
        scores[f"{name}/client"] = np.array([data.name(c) for c in range(data.num_clients)])
        scores[f"{name}/examples"] = data.sizes
    return scores


if __name__ == "__main__":
    binary.run(main, __doc__ or "", registry.describe)
