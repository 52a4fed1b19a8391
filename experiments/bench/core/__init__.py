"""The shared parts of all benchmarks, from the problem to the picture.

==============  ======================================================================================================
``problem``     a ``Track``: clients, their loss, what is measured, and the runs for tuning and for measuring
``rule``        a ``Rule``: what competes on a track, and the knobs that it is tuned by
``tuning``      the search over a rule's knobs, of equally many trials for every rule
``lanes``       the compiled program that trains all points of a rule on all runs of a track
``grid``        runs every pair of a track and a rule that the results lack
``results``     ``results.jsonl``, a line for each pair
``standing``    scores, intervals and ranks
``table``       Markdown
``picture``     Matplotlib
``command``     flags, and what a binary does with them
==============  ======================================================================================================
"""
