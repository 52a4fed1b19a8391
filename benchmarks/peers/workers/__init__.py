"""One module for each peer; each is imported in an environment that has that peer's packages."""
