"""Four benchmarks that tune all entries alike and measure on other runs: ``clip``, ``comm``, ``privacy``, ``robust``.

Each file holds what the benchmark compares, its table and its picture. ``core`` runs it. ``tracks``, ``rules``,
``mechanisms`` and ``threats`` list what is compared.
"""
