"""How command lines become runs: flags, component specs, run directories."""
