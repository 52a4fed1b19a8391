"""Where the rows of a run go: trackers of experiments, TensorBoard, a bar of progress.

A sink is a function of a row, for ``fc.train(..., on_round=sink)``. Those here are contexts, too: at the end of the
``with`` they send what is left and end the tracker's run.
"""

from fedjax_clip.sinks.base import Sink, several
from fedjax_clip.sinks.displays import progress, tensorboard
from fedjax_clip.sinks.trackers import mlflow, wandb

__all__ = ["Sink", "mlflow", "progress", "several", "tensorboard", "wandb"]
