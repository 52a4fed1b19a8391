"""Fine-tunes published models federatedly: MiniLM on tweets, SmolLM2 on Shakespeare's dialogues.

  python benchmarks/large.py tweets       # head, LoRA: rates by one seed, measured on three others
  python benchmarks/large.py dialogues    # perplexity before and after, three seeds
  python benchmarks/large.py step         # time and memory of a bare local step of SmolLM2's shapes, random weights

The first two need the packages of docs/tasks/fine_tuning.md. Each run is kept in large.json, so they go on.
"""

import json
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np
import optax

import fedjax_clip as fc

RECORD = pathlib.Path(__file__).with_suffix(".json")
TUNED_ON, SEEDS = 9, (0, 1, 2)
RATES = {"head": (0.003, 0.01), "lora": (0.001, 0.003)}


def run(task: fc.tasks.Task, rate: float, clip: float, seed: int, rounds: int, cohort: int, batch: int) -> dict:
    """Trains, and evaluates before and after."""
    params = jax.tree.map(np.asarray, task.init(jax.random.key(seed)))
    tx = optax.chain(fc.clipping.clip_by_global_norm(clip), optax.adam(rate))
    algorithm = fc.fedavg(task.per_example_loss, tx)
    if task.frozen is not None:
        algorithm = fc.partially_frozen(algorithm, task.frozen)
    evaluate = fc.evaluator(
        task.per_example_loss, task.evaluation, summarise=task.summarise, batch_size=task.evaluated_at_once
    )
    before = evaluate(params)
    began = time.perf_counter()
    result = fc.train(
        algorithm, task.data, params, rounds=rounds, cohort_size=cohort, batch_size=batch, local_steps=4, seed=seed
    )
    seconds = time.perf_counter() - began
    sent = sum(row["bytes_up"] + row["bytes_down"] for row in result.history)
    clipped = float(np.mean([row["clipped_steps"] for row in result.history]))
    after = evaluate(result.params)
    return {
        "before": {k: float(v) for k, v in before.items()},
        "after": {k: float(v) for k, v in after.items()},
        "bytes": sent,
        "clipped_steps": clipped,
        "seconds_a_round": float(np.median([row["seconds"] for row in result.history])),
        "seconds": seconds,
    }


def kept(name: str, make: Any) -> dict:
    """What a run found, from the record or now."""
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if name not in record:
        record = {**record, name: make()}
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
    print(name, record[name]["after"], f"{record[name]['seconds']:.0f} s", flush=True)
    return record[name]


def tweets() -> None:
    """Head and LoRA with rates of their own, by the accuracy of the seed that is not measured."""

    def one(tune: str, rate: float, seed: int) -> dict:
        def make() -> dict:
            return run(fc.tasks.tweets_bert(tune=tune, seed=seed), rate, 1.0, seed, 40, 10, 8)

        return kept(f"tweets, {tune}, rate {rate}, seed {seed}", make)

    for tune, rates in RATES.items():
        best = max(rates, key=lambda rate: one(tune, rate, TUNED_ON)["after"]["examples/accuracy"])
        for seed in SEEDS:
            one(tune, best, seed)


def dialogues() -> None:
    """LoRA of SmolLM2 at one rate."""
    for seed in SEEDS:
        kept(
            f"dialogues, seed {seed}",
            lambda seed=seed: run(fc.tasks.shakespeare_dialogues(seed=seed), 0.003, 1.0, seed, 6, 8, 1),
        )


def step() -> None:
    """One row of 256 tokens, adapters of rank 8, the base in 32, 8 and 4 bits, in turns."""
    model = fc.models.Llama(49_152, rematerialise=True)
    params = model.init(jax.random.key(0), np.zeros((1, 4), np.int32))
    tokens = np.random.default_rng(0).integers(49_152, size=(1, 257)).astype(np.int32)
    batch = {"tokens": tokens, "segments": np.ones_like(tokens), "answers": np.ones(tokens.shape, bool)}
    cases = {}
    for bits in (32, 8, 4):
        base = params if bits == 32 else fc.models.quantised(params, bits)
        tuned = fc.lora(fc.tasks.next_token(model), base, 8, "query|value", beside=True)
        whole = tuned.init(jax.random.key(1))

        def mean(adapters: Any, base: Any, tuned: Any = tuned) -> Any:
            return tuned.per_example_loss({"base": base, "adapters": adapters}, batch, None)[0].mean()

        arguments = whole["adapters"], whole["base"]
        compiled = jax.jit(jax.grad(mean)).lower(*arguments).compile()
        cases[bits] = compiled, arguments, list[float]()
    for _ in range(6):
        for compiled, arguments, seconds in cases.values():
            began = time.perf_counter()
            jax.block_until_ready(compiled(*arguments))
            seconds.append(time.perf_counter() - began)
    for bits, (compiled, _, seconds) in cases.items():
        memory = compiled.memory_analysis()
        sizes = memory.temp_size_in_bytes / 1e9, memory.argument_size_in_bytes / 1e9
        print(f"{bits} bits: {np.median(seconds[1:]):.2f} s, {sizes[0]:.2f} GB of temporaries, {sizes[1]:.2f} GB given")


if __name__ == "__main__":
    {"tweets": tweets, "dialogues": dialogues, "step": step}[sys.argv[1]]()
