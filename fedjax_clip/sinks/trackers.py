"""Trackers of experiments: Weights & Biases and MLflow."""

import re
from collections.abc import Mapping
from typing import Any

from fedjax_clip.core import checks, files
from fedjax_clip.core.files import PathLike
from fedjax_clip.core.types import InvalidInput, Row
from fedjax_clip.sinks.base import Sink, imported


def wandb(
    project: str = "fedjax_clip",
    name: str | None = None,
    mode: str = "offline",
    directory: PathLike | None = None,
    id: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> Sink:
    """Weights & Biases, by default offline: files that ``wandb sync`` uploads when you want it to.

    Needs ``pip install 'fedjax_clip[wandb]'``. Only rows are kept: no console output, code, git state or statistics of
    the machine.

    Args:
      project: of W&B.
      name: of the run; W&B makes one up by default.
      mode: ``"offline"``, or ``"online"``, which needs an account and uploads each row.
      directory: for W&B's files; by default ``./wandb``.
      id: of an earlier run, to go on with it.
      config: settings that W&B keeps with the run.

    Raises:
      InvalidInput: wandb is not installed, an unknown mode, a run that cannot be begun.

    Example:
      >>> sink = fc.sinks.wandb(project="digits")  # for fc.train(..., on_round=sink)
      >>> sink.close()  # no row came, so nothing was opened
    """
    if mode not in ("offline", "online"):
        raise InvalidInput(f"mode must be 'offline' or 'online', not {checks.shown(mode)}.")
    return _Wandb(imported("wandb"), project, name, mode, directory, id, config)


def mlflow(
    store: str = "sqlite:///mlflow.db",
    experiment: str = "fedjax_clip",
    name: str | None = None,
    id: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> Sink:
    """MLflow, by default in a local database, the file ``mlflow.db``.

    Needs ``pip install 'fedjax_clip[mlflow]'``; to look at it, ``pip install mlflow`` and
    ``mlflow ui --backend-store-uri=sqlite:///mlflow.db``. A run that is gone on with by its id keeps each round once:
    the store knows which it has.

    Args:
      store: the tracking URI: ``sqlite:///`` and a file, or a server's address.
      experiment: made if it does not exist.
      name: of the run; MLflow makes one up by default.
      id: of an earlier run, to go on with it.
      config: settings, which become the run's parameters.

    Raises:
      InvalidInput: mlflow is not installed, or a store that cannot be opened.

    Example:
      >>> sink = fc.sinks.mlflow("sqlite:///runs.db")  # for fc.train(..., on_round=sink)
      >>> sink.close()  # no row came, so nothing was opened
    """
    return _Mlflow(imported("mlflow"), store, experiment, name, id, config)


class _Wandb(Sink):
    def __init__(self, module: Any, project: str, name: Any, mode: str, directory: Any, id: Any, config: Any):
        super().__init__(id, config)
        self.module, self.project, self.name, self.mode, self.directory = module, project, name, mode, directory

    def begin(self, round: int) -> None:
        quiet = {"console": "off", "silent": True, "disable_git": True, "save_code": False, "x_disable_stats": True}
        quiet |= {"x_disable_meta": True, "disable_code": True, "x_disable_machine_info": True}
        quiet |= {"x_save_requirements": False, "host": "-"}
        known = self.module.Settings.model_fields
        settings = self.module.Settings(**{key: value for key, value in quiet.items() if key in known})
        told: dict[str, Any] = {"project": self.project, "name": self.name, "config": self.config, "id": self.id}
        told["dir"] = None if self.directory is None else str(files.expanded(self.directory))
        try:
            self.run = self.module.init(mode=self.mode, resume="allow", reinit="create_new", settings=settings, **told)
        except (self.module.Error, ValueError) as error:
            raise InvalidInput(f"wandb: {' '.join(str(error).split())}") from error
        self.id = self.run.id
        self.last = max(self.last, self.run.step - 1)  # of a run that goes on online: W&B knows what it has

    def write(self, round: int, row: Row) -> None:
        self.run.log(row, step=round)

    def end(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class _Mlflow(Sink):
    def __init__(self, module: Any, store: str, experiment: str, name: Any, id: Any, config: Any):
        super().__init__(id, config)
        self.module, self.store, self.experiment, self.name = module, store, experiment, name

    def begin(self, round: int) -> None:
        try:
            self.client = self.module.MlflowClient(tracking_uri=self.store)
            if self.id is None:
                self.id = self._created()
            else:
                self.client.update_run(self.id, status="RUNNING")
                self.last = max(self.last, int(self.client.get_run(self.id).data.metrics.get("round", 0)))
        except Exception as error:  # SQLAlchemy, requests and MLflow raise almost anything
            why = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            raise InvalidInput(f"mlflow: the store {self.store} cannot be used: {why}.") from error

    def _created(self) -> str:
        found = self.client.get_experiment_by_name(self.experiment)
        number = self.client.create_experiment(self.experiment) if found is None else found.experiment_id
        id = self.client.create_run(number, run_name=self.name).info.run_id
        params = [self.module.entities.Param(_mlflow_name(k), str(v)[:6000]) for k, v in self.config.items()]
        self.client.log_batch(id, params=params)
        return id

    def write(self, round: int, row: Row) -> None:
        now = self.module.utils.time.get_current_time_millis()
        entries = {_mlflow_name(name): value for name, value in row.items()} | {"round": float(round)}
        metrics = [self.module.entities.Metric(name, value, now, round) for name, value in entries.items()]
        self.client.log_batch(self.id, metrics=metrics)

    def end(self, failed: bool) -> None:
        self.client.set_terminated(self.id, "FAILED" if failed else "FINISHED")


def _mlflow_name(name: str) -> str:
    """The name in the letters that MLflow takes."""
    return re.sub(r"[^/\w.\- ]", "_", name)
