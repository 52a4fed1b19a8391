"""Applies the model of a run directory to new data.

  python -m experiments.predict runs/csv-fedavg-1a2b3c new.csv
  python -m experiments.predict runs/digits-fedavg-1a2b3c drawn.npz --out=digits.csv

The new data are what the run's task was trained on: a table (.csv), arrays (.npy, or .npz with a field x), or texts
(.txt, one on each line). If the target is there, too, scores are printed. Columns that the model does not use are kept.
"""

import csv
import io
import pathlib
from collections.abc import Iterable

import numpy as np
from absl import flags

from experiments.config import binary
from fedjax_clip import tasks
from fedjax_clip.core import files
from fedjax_clip.core.types import InvalidInput
from fedjax_clip.tasks import inputs
from fedjax_clip.tasks.loading import PARAMS

FLAGS = flags.FLAGS
MOST_CLASSES = 20  # with more, only the probability of the prediction is written

flags.DEFINE_enum(
    "params",
    "params",
    list(PARAMS),
    "Of which round the parameters are: the last one, the best one, or an average, if the run kept them.",
)
flags.DEFINE_string(
    "out",
    None,
    "Where to write, a new file; by default predictions.csv.",
    allow_override=True,  # other binaries have one, too
)


def main(*operands: str) -> None:
    """Reads a run directory and new data, and writes predictions."""
    if len(operands) != 2:
        raise InvalidInput("Name a run directory and a file: python -m experiments.predict RUN_DIRECTORY new.csv")
    out = new_file(FLAGS.out or "predictions.csv")
    binary.configure_jax(1)
    model = tasks.load(operands[0], FLAGS.params)
    data = operands[1]
    kept, unused = identifiers(model, data)
    found = model.predict(data)
    columns = kept | predicted(model, found)
    if len(columns) < len(kept) + len(predicted(model, found)):
        twice = next(name for name in kept if name in predicted(model, found))
        raise InvalidInput(f"{data} has a column {twice!r}, which the predictions need: rename it.")
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    files.write(out, text.getvalue())
    print(f"wrote {out}: {len(found.prediction)} rows")
    if unused:
        print(f"kept, and not used by the model: {', '.join(unused)}")
    scores = model.score(data, found)
    if scores:
        print(f"of {scores.pop('examples'):.0f} rows whose {model.target or 'y'} is known: ", end="")
        print(", ".join(f"{name} {value:.4g}" for name, value in scores.items()))


def new_file(path: str) -> pathlib.Path:
    """A path at which nothing exists yet."""
    out = files.expanded(path)
    if out.exists() or out.is_symlink():
        raise InvalidInput(f"--out: {out} exists, and is not overwritten: name another file, or remove it.")
    return out


def identifiers(model: tasks.Model, data: str) -> tuple[dict[str, Iterable[object]], list[str]]:
    """What is kept of each row beside its prediction, and the columns of a table without an effect on it."""
    if model.predictor.kind == "table":
        table, _ = inputs.read_table(data)
        used = {column["name"] for column in model.predictor.input["columns"]}
        kept = {name: values.tolist() for name, values in table.items() if name not in used}
        rows = len(next(iter(table.values())))
        return kept or {"row": range(2, rows + 2)}, [name for name in kept if name != model.target]
    if model.predictor.kind == "array":
        return {"row": range(len(inputs.read_arrays(data)["x"]))}, []
    return {"text": inputs.read_lines(data)}, []


def predicted(model: tasks.Model, found: tasks.Predictions) -> dict[str, Iterable[object]]:
    """The columns of predictions."""
    columns: dict[str, Iterable[object]] = {"prediction": found.prediction}
    if found.probability is None:
        return columns
    if len(model.names) > MOST_CLASSES:
        return columns | {"probability": np.max(found.probability, axis=1)}
    return columns | {f"probability_{name}": p for name, p in zip(model.names, found.probability.T, strict=True)}


if __name__ == "__main__":
    binary.run(main, __doc__ or "", operands=True)
