"""Writes the model of a run directory as a file for other programs.

  python -m experiments.export runs/digits-fedavg-1a2b3c --to=onnx --out=digits.onnx
  python -m experiments.export runs/digits-fedavg-1a2b3c --to=stablehlo
  python -m experiments.export runs/digits-fedavg-1a2b3c --to=safetensors

onnx is for phones, browsers and other languages; stablehlo for JAX without this library; safetensors holds the
parameters alone. docs/use-a-model.md shows how each is used.
"""

from absl import flags

import fedjax_clip as fc
from experiments.config import binary
from experiments.predict import new_file
from fedjax_clip import tasks
from fedjax_clip.core.types import InvalidInput

FLAGS = flags.FLAGS
FORMATS = {"onnx": fc.export.onnx, "stablehlo": fc.export.stablehlo, "safetensors": fc.export.safetensors}

flags.DEFINE_enum("to", "onnx", list(FORMATS), "The file's format.")
flags.DEFINE_string(
    "out",
    None,
    "Where to write, a new file; by default model.onnx, say.",
    allow_override=True,  # other binaries have one, too
)


def main(*operands: str) -> None:
    """Reads a run directory and writes its model."""
    if len(operands) != 1:
        raise InvalidInput("Name a run directory: python -m experiments.export RUN_DIRECTORY --to=onnx")
    out = new_file(FLAGS.out or f"model.{FLAGS.to}")
    binary.configure_jax(1)
    model = tasks.load(operands[0], FLAGS.params)
    FORMATS[FLAGS.to](model, out)
    print(f"wrote {out}: {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    binary.run(main, __doc__ or "", operands=True)
