"""Federated learning with gradient clipping: whole rounds as one compiled JAX program."""

#from fedjax_clip import checkpoint, clipping, metrics, placement, reduce, tasks, uplink
#from fedjax_clip.algorithms import fedavg, fedsgd
#from fedjax_clip.cohort import Client, Cohort
#from fedjax_clip.data import partition, sampling, sources
#from fedjax_clip.data.planning import LocalWork, plan
#from fedjax_clip.data.population import FederatedData
#from fedjax_clip.exchange import exchange
#from fedjax_clip.local import local_gradient, local_update
#from fedjax_clip.reduce import Reducer, uniform_mean, weighted_mean
#from fedjax_clip.training import Result, evaluator, train
#from fedjax_clip.typing import Algorithm, InvalidInput
#from fedjax_clip.uplink import Uplink

__version__ = "0.1.0"
