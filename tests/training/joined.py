"""What each process of test_processes.py does: joined.py PROCESSES NUMBER ADDRESS DIRECTORY SCENARIO.

It writes what it saw to ``DIRECTORY/SCENARIO.NUMBER``, pickled.
"""

import pathlib
import pickle
import shutil
import sys

import jax
import numpy as np
from problems import ENTRIES, parameters, population, softmax_loss

import fedjax_clip as fc
from fedjax_clip.training import agreement, planner, states

SIZES = tuple(3 + 5 * c % 17 for c in range(23))
TRAINED = ("fedavg, stateful link", "episode_plus", "partially_private")
ON_DISK = TRAINED[-2:]  # whose clients' states lie in a file of each process


def problem(algorithm):
    """A population, and what else ``fc.train`` takes; held-out examples fill four batches."""
    data, held = population(SIZES), population(SIZES, seed=9)
    evaluate = fc.evaluator(softmax_loss, {"held": held}, algorithm=algorithm, population=data, batch_size=64)
    return data, {"rounds": 8, "cohort_size": 7, "batch_size": 4, "seed": 5, "evaluate": evaluate, "eval_every": 3}


def seen(result):
    """What all processes must hold alike, to the bit."""
    return jax.tree.map(np.asarray, (result.params, result.state.server, result.state.clients)), result.history


def train(directory):
    """Several algorithms, the largest with batches that are packed for each round; each is saved and resumed."""
    found = {}
    for name in TRAINED:
        algorithm = ENTRIES[name]()
        data, common = problem(algorithm)
        planner.RESIDENT_BYTES = 0 if name == TRAINED[0] else 2**29
        states.MEMORY_BYTES = 0 if name in ON_DISK else 2**30
        whole = fc.train(algorithm, data, parameters(), checkpoints=directory / f"{name}, whole", **common)
        place = directory / name
        half = fc.train(algorithm, data, parameters(), checkpoints=place, **common | {"rounds": 6})
        if jax.process_index() == 0:
            shutil.copytree(place, directory / f"{name}, half")
        resumed = fc.train(algorithm, data, parameters(), checkpoints=place, **common)
        found[name] = seen(whole), seen(half), seen(resumed)
    return found


def parts(directory):
    """A population of which each process opens the clients that are not in the other's part."""
    whole, number = population(SIZES), jax.process_index()
    clients = np.flatnonzero(np.arange(len(SIZES)) % 3 == 0 if number else np.arange(len(SIZES)) % 3)
    examples = whole.select(clients).examples
    part, algorithm = fc.data.parts.opened(examples, clients, SIZES), ENTRIES["fedavg"]()
    twice = fc.data.parts.opened(whole.select([0, *clients[1:]]).examples, [0, *clients[1:]], SIZES)
    wrong = population(SIZES)
    wrong.examples["y"][wrong.offsets[3]] = 99  # of client 3, whom process 1 opens
    wrong = fc.data.parts.opened(wrong.select(clients).examples, clients, SIZES)
    common = problem(algorithm)[1]
    return {
        "trained": seen(fc.train(algorithm, part, parameters(), **common)),
        "twice": tried(algorithm=algorithm, data=twice),
        "label": tried(algorithm=algorithm, data=wrong, cohort_size=len(SIZES)),
        "whole": tried(algorithm=algorithm, data=part if number else whole),
        "alone": tried(algorithm=algorithm, data=part, devices=jax.local_devices()),
    }


def tried(**options):
    """What became of a short training: the rounds done, or the error's sentence."""
    try:
        common = {"rounds": 4, "cohort_size": 7, "rounds_per_dispatch": 1}
        return len(fc.train(**{"data": population(SIZES), "params": parameters()} | common | options).history)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def differ(directory):
    """What becomes of trainings in which the processes do not want the same, or one of them fails."""
    number, algorithm = jax.process_index(), ENTRIES["fedavg"]()
    agreement.PATIENCE = 1.0
    seen = []

    def fails(wanted):
        def fail(value=None):
            seen.append(value)
            if number == 1:
                raise ValueError(wanted)
            return {}

        return fail

    other = population(SIZES)
    other.examples["y"][7] += number
    place = directory / "stopped"
    return {
        "seed": tried(algorithm=algorithm, seed=number),
        "data": tried(algorithm=algorithm, data=other),
        "params": tried(algorithm=algorithm, params=parameters(seed=number)),
        "rounds": tried(algorithm=algorithm, rounds=1 - number),
        "secret": tried(algorithm=algorithm, secret=fc.privacy.Secret.fresh()),
        "directory": tried(algorithm=algorithm, checkpoints=directory / str(number) / "own"),
        "file": tried(algorithm=algorithm, checkpoints=pathlib.Path(__file__) / "inside"),
        "devices": tried(algorithm=algorithm, devices=jax.devices()[:3]),
        "debug": tried(algorithm=algorithm, debug=True),
        "on_round": tried(algorithm=algorithm, on_round=fails("the disk is full")),
        "evaluate": tried(algorithm=algorithm, evaluate=fails("no such score"), eval_every=1),
        "should_stop": tried(algorithm=algorithm, should_stop=lambda: number == 1, checkpoints=place),
        "resumed": tried(algorithm=algorithm, checkpoints=place),
        "alone": tried(algorithm=algorithm, devices=jax.local_devices(), rounds=1 + number),
        "rows": len(seen),
    }


def main():
    processes, number, address, directory, scenario = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, int(processes), int(number))
    found = globals()[scenario](pathlib.Path(directory))
    (pathlib.Path(directory) / f"{scenario}.{number}").write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main()
