"""pfl-research with PyTorch: its own FederatedAveraging, simulated backend, clip and weighting."""

import asyncio

import pfl.algorithm.base
import pfl.algorithm.federated_averaging
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam.base import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel

from workers import torch_model
from workers.paused import Paused


class _Module(torch_model.Model):
    def metrics(self, x, y, eval=False):
        return {}


class Peer:
    """Holds pfl's loop up between laps in a callback."""

    def __init__(self, task, devices):
        torch.set_num_threads(torch_model.threads(task, devices))
        self.task = task
        self.users = [Dataset(raw_data=pair) for pair in torch_model.clients(task)]
        self.module = _Module(task)
        self.model = PyTorchModel(
            self.module,
            local_optimizer_create=torch.optim.SGD,
            central_optimizer=torch.optim.SGD(self.module.parameters(), 1.0),
        )
        self.paused = Paused(self._train)

    def run(self, rounds):
        self.paused.run(rounds)

    def params(self):
        self.paused.stop()
        return self.module.numpy()

    def _train(self, first_round, after_round):
        asyncio.set_event_loop(asyncio.new_event_loop())  # pfl asks for this thread's
        task, paused = self.task, self.paused
        order = (int(c) for r in range(first_round, 10**6) for c in task.cohort(r))
        data = FederatedDataset(lambda c: self.users[c], lambda: next(order))

        class Gate(TrainingProcessCallback):
            def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
                paused.count += 1
                return after_round(), Metrics()

        pfl.algorithm.federated_averaging.FederatedAveraging().run(
            pfl.algorithm.base.NNAlgorithmParams(
                central_num_iterations=10**6,
                evaluation_frequency=10**9,  # the first round, which is compared but not timed, evaluates
                train_cohort_size=len(task.cohorts[0]),
                val_cohort_size=None,
            ),
            SimulatedBackend(data, data, postprocessors=[WeightByDatapoints()]),
            self.model,
            NNTrainHyperParams(
                local_batch_size=task.batch,
                local_num_epochs=1,
                local_learning_rate=task.lr,
                local_max_grad_norm=task.clip,
            ),
            callbacks=[Gate()],
            send_metrics_to_platform=False,
        )
