"""What each link and each reducer costs: a round of task C (the CNN) with it against the same round without, in turns.

  python benchmarks/links.py [--task=C] [--devices=1] [--rounds=20] [--wall]
                             [--only='clip_by_global_norm(1.0);zeroing()']

A link is written as ``experiments.run --uplink`` takes it, a reducer as ``--reducer`` does, both as ``LINK & REDUCER``.
Printed are processors' seconds of a round without, and how much more a round takes with it: the median of the ratios of
pairs of rounds, and a 95% interval of it from their order; last, the link's share of the round with it.
"""

import argparse
import pathlib
import sys

import jax
import optax
import turns
from workers.fedjax_clip import loss

import fedjax_clip as fc

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from experiments.config import privacy, registry, spec

CLIP = "clip_by_global_norm(1.0)"
LINKS = (
    CLIP,
    "quantile_clip()",
    "zeroing()",
    "clip21(1.0)",
    "relative_to_last()",
    f"{CLIP}|gaussian(1.0)",
    f"{CLIP}|gaussian(1.0, mechanism=tree(16))",
    f"{CLIP}|local_gaussian(1.0)",
    f"{CLIP}|integer_grid(16)",
    f"{CLIP}|integer_grid(8, rotate=True)",
    f"{CLIP}|discrete_gaussian(1.0)",
    f"{CLIP}|skellam(1.0)",
    f"{CLIP}|integer_grid(16) & pairwise_masks()",
    f"{CLIP} & ckks_mean()",
    "uniform(8)",
    "qsgd(4, bucket=512)",
    "qsgd(4, bucket=512, coding='huffman')",
    "sign()",
    "terngrad(bucket=512)",
    "kmeans(16)",
    "eden(1)",
    "rotated(uniform(4))",
    "top_k(0.01)",
    "random_k(0.01)",
    "threshold(0.01)",
    "error_feedback(top_k(0.01))",
    "power_sgd(4)",
    "count_sketch(5, 5000, k=1000)",
    "sign_flip((0,))",
    "& exact_mean()",
    "& median()",
    "& trimmed_mean(2)",
    "& krum(2)",
    "& geometric_median()",
    "& norm_bounded(1.0)",
    "relative_to_last() & centered_mean(1.0)",
    "& bucketing(median(), 2)",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=1, help="XLA host devices")
    parser.add_argument("--rounds", type=int, default=20, help="of each side")
    parser.add_argument("--only", help="links and reducers, joined by semicolons")
    parser.add_argument("--wall", action="store_true", help="time on the wall in place of the processors'")
    parser.add_argument("--task", default="C", help="of peers/tasks.py: M, MR, C")
    parser.add_argument("--tiny", action="store_true", help="a small population: to see that it runs")
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", arguments.devices)
    task, data = turns.population(arguments.task, arguments.tiny)
    cohort_size = len(task.cohort(0))

    def fedavg(text: str = "") -> fc.extend.Algorithm:
        links, _, reducer = (part.strip() for part in text.partition("&"))
        uplink = privacy.chain(links, None) if links else fc.uplink.identity()
        reducers = registry.reducers(cohort_size)
        needed = registry.needed_reducer(uplink) or "weighted_mean"
        reduced = spec.one(reducer or needed, reducers, "--only", reducers)
        return fc.fedavg(loss(task), optax.sgd(task.lr), uplink=uplink, reducer=reduced)

    for text in arguments.only.split(";") if arguments.only else LINKS:
        sides = [turns.Side(task, data, algorithm, arguments.wall) for algorithm in (fedavg(), fedavg(text))]
        seconds = turns.compare(sides, arguments.rounds)
        print(f"{text:<60} {turns.more(seconds)}   {turns.share(seconds):6.1%}", flush=True)


if __name__ == "__main__":
    main()
