"""The way of one round of FedAvg through the library: files and functions, as a reader meets them.

  python benchmarks/one_round.py [--all]

It starts at the call of ``fc.train`` and ends where ``step_server`` returns. A function is on the way if it is on the
call stack when one of the round's stations is reached: clients are sampled, their batches are planned, the user's loss
is called, a message is encoded, added, averaged and decoded, the server steps. Functions defined inside another one
count with it, since a reader meets them there. Not on the way is what is called and returns before a station: checks
of arguments, set-up, arithmetic on trees, metrics. ``--all`` lists these as well. Of the way, those are counted apart
that lead to the loss or to the server's step: the others are calls of a sampler, a plan, a link or a reducer, which a
reader may take by their names.
"""

import pathlib
import sys

import jax.numpy as jnp
import numpy as np
import optax

import fedjax_clip as fc

ROOT = pathlib.Path(fc.__file__).parent
STATIONS = {  # by file and name of the function that is entered there
    ("data/sampling.py", "uniform.<locals>.sample"): "clients are sampled",
    ("data/planning.py", "plan_rounds"): "their batches are planned",
    ("", "loss"): "the loss is called",
    ("uplink/base.py", "encoded"): "a message is encoded",
    ("reduce/base.py", "_mean.<locals>.add"): "and added",
    ("reduce/base.py", "_mean.<locals>.finish"): "the sum becomes a mean",
    ("uplink/base.py", "decoded"): "and is decoded",
    ("algorithms/base.py", "step_server"): "the server steps",
}
Place = tuple[str, str]  # file and function


def loss(params, batch, key):
    return (batch["x"] @ params["w"] - batch["y"]) ** 2


def place(code) -> Place | None:
    """Where a code object is written, if that is in the library or here."""
    if code.co_filename == __file__:
        return "", code.co_qualname
    if not code.co_filename.startswith(str(ROOT)):
        return None
    return str(pathlib.Path(code.co_filename).relative_to(ROOT)), code.co_qualname


def walk() -> tuple[list[tuple[Place, str]], set[Place], list[Place]]:
    """``(way, straight, entered)``: what is on the way, each with the station on whose stack it is first; what of it is
    on the stack of the loss or of the server's step; and all that is entered.
    """
    way: dict[Place, str] = {}
    entered: dict[Place, None] = {}
    reached: set[Place] = set()
    straight: set[Place] = set()
    done = False

    def profile(frame, event, argument):
        nonlocal done
        here = None if done else place(frame.f_code)
        if here is None:
            return
        if event == "return":
            done = here == ("algorithms/base.py", "step_server")
            return
        if event != "call":
            return
        if here[0]:
            entered.setdefault(here)
        if here in STATIONS and here not in reached:
            reached.add(here)
            stack = []
            while frame is not None:
                stack.append(place(frame.f_code))
                frame = frame.f_back
            for file, name in filter(None, reversed(stack)):
                if file:
                    there = file, name.split(".<locals>")[0]
                    way.setdefault(there, STATIONS[here])
                    if here[1] in ("loss", "step_server"):
                        straight.add(there)

    x = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
    data = fc.FederatedData({"x": x, "y": x.sum(1)}, [0, 4, 8, 12])
    algorithm = fc.fedavg(loss, optax.sgd(0.1))
    sys.setprofile(profile)
    fc.train(algorithm, data, {"w": jnp.zeros(3)}, rounds=1, cohort_size=2, batch_size=2)
    sys.setprofile(None)
    assert reached == STATIONS.keys(), f"not reached: {STATIONS.keys() - reached}"
    return list(way.items()), straight, list(entered)


def main() -> None:
    way, straight, entered = walk()
    station = None
    for (file, name), reached in way:
        if reached != station:
            print(f"until {(station := reached)}:")
        print(f"  {file:28} {name}")
    files = {file for (file, _), _ in way}
    print(f"{len(way)} functions in {len(files)} files are on the way: {', '.join(sorted(files))}.")
    spine = [here for here, reached in way if here in straight]
    print(
        f"{len(spine)} in {len({file for file, _ in spine})} files of these lead to the loss and to the server's step."
    )
    named = {(file, name.split(".<locals>")[0]) for file, name in entered}
    print(f"{len(named)} functions in {len({f for f, _ in named})} files are entered in all, each counted once.")
    if "--all" in sys.argv[1:]:
        for file, name in sorted(named - {place for place, _ in way}):
            print(f"  {file:28} {name}")


if __name__ == "__main__":
    main()
