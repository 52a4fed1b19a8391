"""A client with its local work, as an algorithm uses it."""

import dataclasses
from collections.abc import Callable

import jax
import optax

from fedjax_clip.core import stateful
from fedjax_clip.core.cohort import Client
from fedjax_clip.core.loss import Gradient
from fedjax_clip.core.types import Array, Metrics, Params, PerExampleLoss, PyTree
from fedjax_clip.local.steps import full_gradient, full_step, local_steps, mean_loss


@dataclasses.dataclass(frozen=True)
class Worker(Client):
    """One client of a round, with the algorithm's loss, optimiser and gradient.

    Attributes:
      per_example_loss: the client's loss.
      tx: the client's optimiser of this round.
      gradient_of: the gradient of a batch: the algorithm's ``gradient``.

    Example:
      >>> def client_fn(x, client, key):  # of FedAvg; ``client`` is a Worker
      ...     y, _, _, report = client.local_steps(x, key)
      ...     return optax.tree.sub(y, x), client.state.own, report
    """

    per_example_loss: PerExampleLoss
    tx: optax.GradientTransformation
    gradient_of: Gradient

    def local_steps(
        self,
        params: Params,
        key: Array,
        *,
        adjust: Callable[[PyTree, Params, Array], PyTree] | None = None,
        opt_state: PyTree | None = None,
        collect: bool = False,
    ) -> tuple[Params, PyTree, PyTree, Metrics]:
        """One optimiser step for each of the client's batches, from ``params``.

        Args:
          params: where the client starts, x.
          key: PRNG key of this client and round.
          adjust: ``(gradient, y, step) -> direction``, between the gradient and the optimiser.
          opt_state: the optimiser's state to begin with; a fresh one by default.
          collect: whether to average the raw gradients.

        Returns:
          ``(y, opt_state, mean raw gradient or (), report)``.
        """
        return local_steps(
            *(self.per_example_loss, self.tx, params, self, key),
            adjust=adjust,
            gradient=self.gradient_of,
            opt_state=opt_state,
            collect=collect,
        )

    def gradient(self, params: Params, step: Array, key: Array) -> PyTree:
        """The gradient at ``params`` on the batch of a local step, with the randomness of that step.

        Args:
          params: where it is taken.
          step: int32 scalar, number of the local step.
          key: the key that ``local_steps`` was given.
        """
        batch, weights = self.batch(step)
        state, params = stateful.split(self.per_example_loss, params)
        here = jax.random.fold_in(key, step)
        return stateful.gradient_and_state(
            self.gradient_of, self.per_example_loss, params, state, batch, weights, here
        )[0]

    def full_gradient(self, params: Params, key: Array) -> tuple[PyTree, Metrics]:
        """The gradient at ``params`` of the mean loss over all of the client's batches, and its report.

        Args:
          params: where it is taken.
          key: PRNG key of this client and round.
        """
        return full_gradient(self.per_example_loss, params, self, key, self.gradient_of)

    def mean_loss(self, params: Params, key: Array) -> Array:
        """The mean loss at ``params`` over all of the client's batches, float32 scalar.

        Args:
          params: where it is taken.
          key: PRNG key of this client and round.
        """
        return mean_loss(self.per_example_loss, params, self, key)

    def full_step(self, params: Params, key: Array) -> tuple[PyTree, Metrics]:
        """The update of one optimiser step along ``full_gradient``, and its report.

        Args:
          params: where the client starts, x.
          key: PRNG key of this client and round.
        """
        return full_step(self.per_example_loss, self.tx, params, self, key, self.gradient_of)
