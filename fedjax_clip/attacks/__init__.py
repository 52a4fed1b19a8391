"""Attacks by malicious clients: on their data, on their messages, and in collusion, with knowledge of honest messages.

They test the defences of ``fc.reduce``. ``clients`` lists the malicious clients by number: their places in the
population, where ``data.name(number)`` is the name. Attacks on data are functions of a population. Attacks on messages
are links: put them LAST in a chain, so that no clip bounds them. Colluding attacks wrap the reducer, where the honest
messages of the round are known. Attacks on privacy read: one client's message (``inverted``), or the trained model
(``separation`` of members by their losses).
"""

from fedjax_clip.attacks.collusion import alie, colluding, ipm, mimic, optimal_alie, optimal_ipm, strongest
from fedjax_clip.attacks.inversion import dense_inputs, inverted, label_of
from fedjax_clip.attacks.membership import likelihood_ratios, losses_of, separation
from fedjax_clip.attacks.messages import constant, noise, replaced, scaling, sign_flip
from fedjax_clip.attacks.poison import backdoor, label_flip, triggered

__all__ = [
    "alie",
    "backdoor",
    "colluding",
    "constant",
    "dense_inputs",
    "inverted",
    "ipm",
    "label_flip",
    "label_of",
    "likelihood_ratios",
    "losses_of",
    "mimic",
    "noise",
    "optimal_alie",
    "optimal_ipm",
    "replaced",
    "scaling",
    "separation",
    "sign_flip",
    "strongest",
    "triggered",
]
