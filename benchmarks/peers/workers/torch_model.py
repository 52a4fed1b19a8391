"""The tasks' models in PyTorch, for all peers that are built on it."""

import numpy as np
import torch


class Model(torch.nn.Sequential):
    """The task's model, with its initial weights and its loss."""

    def __init__(self, task):
        nn = torch.nn
        if task.name == "L":
            super().__init__(nn.Linear(1, 1))
        elif task.name == "C":
            super().__init__(
                *(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
                *(nn.Linear(12 * 12 * 64, 128), nn.ReLU(), nn.Linear(128, 62)),
            )
        elif task.name in ("M", "MR"):
            super().__init__(
                nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, task.params["b2"].size)
            )
        else:
            raise NotImplementedError(f"Task {task.name} is fedjax_clip's only.")
        self.task_name = task.name
        with torch.no_grad():
            for i, layer in enumerate(self._layers()):
                layer.weight.copy_(torch.from_numpy(_to_torch(task.params[f"w{i}"], i, self.task_name)))
                layer.bias.copy_(torch.from_numpy(task.params[f"b{i}"]))

    def loss(self, x, y):
        """Mean loss of a batch."""
        out = self(x)
        if self.task_name == "L":
            return torch.mean((out[:, 0] - y) ** 2)
        return torch.nn.functional.cross_entropy(out, y)

    def numpy(self):
        """The weights under the task's names."""
        out = {}
        for i, layer in enumerate(self._layers()):
            out[f"w{i}"] = _from_torch(layer.weight.detach().numpy(), i, self.task_name)
            out[f"b{i}"] = layer.bias.detach().numpy()
        return out

    def _layers(self):
        return [m for m in self if hasattr(m, "weight")]


def threads(task, cores):
    """All cores for the CNN, one for the small operations of the others: two are no faster there, and far slower on a
    machine that is not idle."""
    return cores if task.name == "C" else 1


def clients(task):
    """``[(x, y)]`` of all clients as tensors; pictures are ``[channel, height, width]``."""
    x = np.moveaxis(task.x, -1, 1).copy() if task.name == "C" else task.x
    x = torch.from_numpy(x)
    y = torch.from_numpy(task.y if task.y.dtype.kind == "f" else task.y.astype(np.int64))
    parts = zip(task.offsets[:-1], task.offsets[1:], strict=True)
    return [(x[start:stop], y[start:stop]) for start, stop in parts]


def _to_torch(w, i, name):
    if w.ndim == 4:
        return w.transpose(3, 2, 0, 1).copy()
    if name == "C" and i == 2:  # flattened as [height, width, channel] there, [channel, height, width] here
        w = w.reshape(12, 12, 64, -1).transpose(2, 0, 1, 3).reshape(w.shape)
    return w.T.copy()


def _from_torch(w, i, name):
    if w.ndim == 4:
        return w.transpose(2, 3, 1, 0)
    if name == "C" and i == 2:
        return w.T.reshape(64, 12, 12, -1).transpose(1, 2, 0, 3).reshape(w.T.shape)
    return w.T
