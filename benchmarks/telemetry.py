"""What telemetry costs: a round of task M with it against the same round without, alternating in one run.

  python benchmarks/telemetry.py [--devices=1] [--rounds=60] [--only=step,bias]

A clip without telemetry is the same transform with its state dropped, so that there is nothing to report and XLA leaves
out what only the report would need. What every round reports, clip or not (loss, counts, quantiles of the updates'
norms), stays on both sides. Both train at once and take turns, a round each. Of each pair of rounds counts the ratio of
the processors' seconds, all threads together, which a busy machine stretches less than a clock's; printed are the
median ratio and a 95% interval of it, from the order of the ratios.
"""

import argparse

import jax
import numpy as np
import optax
import turns
from turns import tasks
from workers.fedjax_clip import loss

import fedjax_clip as fc
from fedjax_clip import clipping, uplink


def silent(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """A clip without a history, and without its telemetry."""
    return optax.stateless(lambda updates, params: tx.update(updates, tx.init(updates), params)[0])


def pairs(task: tasks.Task) -> dict[str, tuple[fc.extend.Algorithm, fc.extend.Algorithm]]:
    """``(without telemetry, with it)``: of the clip of each step, of the same by layer, of the update's clip, that by
    groups of clients, that with its bias, and of all together.
    """
    step, layers = clipping.clip_by_global_norm(task.clip), clipping.clip(task.clip, scope=clipping.layer())
    sent = clipping.clip_by_global_norm(0.3)
    halves = {"first half": range(500), "second half": range(500, 1000)}
    told = uplink.at_client(sent)

    def fedavg(client_clip, link=None):
        return fc.fedavg(loss(task), optax.chain(client_clip, optax.sgd(task.lr)), uplink=link)

    quiet_link = uplink.at_client(silent(sent))
    quiet_step, quiet_update = fedavg(silent(step)), fedavg(silent(step), quiet_link)
    return {
        "step": (quiet_step, fedavg(step)),
        "layers": (fedavg(silent(layers)), fedavg(layers)),
        "update": (quiet_update, fedavg(silent(step), told)),
        "groups": (quiet_update, fedavg(silent(step), uplink.by_group(told, halves))),
        "bias": (quiet_update, fedavg(silent(step), uplink.with_bias(told))),
        "all": (
            fedavg(silent(layers), quiet_link),
            fedavg(layers, uplink.with_bias(uplink.by_group(told, halves))),
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=1, help="XLA host devices")
    parser.add_argument("--rounds", type=int, default=60, help="of each side")
    parser.add_argument("--only", help="kinds of telemetry, joined by commas")
    parser.add_argument("--tiny", action="store_true", help="a small population: to see that it runs")
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", arguments.devices)
    task, data = turns.population("M", arguments.tiny)
    kinds = pairs(task)
    for name in arguments.only.split(",") if arguments.only else kinds:
        sides = [turns.Side(task, data, algorithm) for algorithm in kinds[name]]
        seconds = turns.compare(sides, arguments.rounds)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), *(side.params for side in sides))
        print(f"{name:<8} {turns.more(seconds)} with telemetry", flush=True)


if __name__ == "__main__":
    main()
