"""Training: rounds sent to the devices, evaluated, saved, resumed and swept."""
