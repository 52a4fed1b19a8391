"""Which functions one round of FedAvg enters, from the call of ``fc.train`` to the return of ``step_server``.

  python benchmarks/one_round.py

Functions of fedjax_clip are listed once each, in the order in which they are first entered.
"""

import pathlib
import sys

import jax.numpy as jnp
import numpy as np
import optax

import fedjax_clip as fc

ROOT = pathlib.Path(fc.__file__).parent


def loss(params, batch, key):
    return (batch["x"] @ params["w"] - batch["y"]) ** 2


def entered() -> list[tuple[str, str, str]]:
    """``(file, function, caller's function)`` in the order of first entries."""
    seen: dict[tuple[str, str], str] = {}
    done = False

    def profile(frame, event, argument):
        nonlocal done
        code = frame.f_code
        if done or not code.co_filename.startswith(str(ROOT)):
            return
        place = str(pathlib.Path(code.co_filename).relative_to(ROOT)), code.co_qualname
        if event == "call":
            back = frame.f_back
            while back is not None and not back.f_code.co_filename.startswith(str(ROOT)):
                back = back.f_back
            seen.setdefault(place, back.f_code.co_qualname if back else "")
        elif event == "return" and place[1] == "step_server":
            done = True

    x = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
    data = fc.FederatedData({"x": x, "y": x.sum(1)}, [0, 4, 8, 12])
    algorithm = fc.fedavg(loss, optax.sgd(0.1))
    sys.setprofile(profile)
    fc.train(algorithm, data, {"w": jnp.zeros(3)}, rounds=1, cohort_size=2, batch_size=2)
    sys.setprofile(None)
    return [(*place, caller) for place, caller in seen.items()]


def main() -> None:
    for i, (file, name, caller) in enumerate(entered()):
        print(f"{i + 1:3} {file:28} {name:48} < {caller}")


if __name__ == "__main__":
    main()
