"""Four benchmarks that tune everybody alike and measure on other runs: ``clip``, ``comm``, ``privacy``, ``robust``.

Each is a page: what it compares, its table and its picture. ``core`` runs it. ``tracks``, ``rules``, ``mechanisms`` and
``threats`` list what is compared.
"""
