"""A made table of patients at five hospitals of very unequal size, for walk-throughs with one's own data.

python tests/made_hospitals.py hospitals.csv 0
"""

import csv
import pathlib
import sys

import numpy as np

SIZES = {"Aalst": 600, "Brugge": 240, "Gent": 120, "Kortrijk": 60, "Ronse": 20}
HEADER = ["hospital", "age", "lactate", "pressure", "sex", "ward", "died"]
WARDS = "surgery", "medicine", "emergency"


def write(path, seed=0, sizes=None, target=True):
    """Writes a CSV: numbers with gaps, words with gaps, and a rare outcome: one patient in ten dies.

    The risk rises with age and lactate, falls with pressure, and is highest in the emergency ward. The hospitals differ
    in their patients' age and in how much they measure. Every hospital has both outcomes.

    Args:
      path: the file.
      seed: of all draws.
      sizes: ``{hospital: rows}``; by default five hospitals of 20 to 600 rows.
      target: whether the outcome is written; without it the file is one of new patients.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for place, (hospital, size) in enumerate((SIZES if sizes is None else sizes).items()):
        age = rng.normal(58 + 4 * (place % 5), 15, size).clip(18, 99)
        lactate, pressure = rng.lognormal(0.5, 0.5, size), rng.normal(120, 20, size)
        sex, ward = rng.choice(["f", "m"], size), rng.choice(WARDS, size, p=[0.4, 0.4, 0.2])
        risk = 0.05 * (age - 60) + 1.2 * (lactate - 1.9) - 0.02 * (pressure - 120) + (ward == "emergency")
        risk += rng.logistic(0, 0.7, size)
        died = risk >= np.sort(risk)[-max(1, round(size / 10))]  # the most at risk: one in ten at every hospital
        unmeasured = 0.05 + 0.1 * (place % 5)
        for i in range(size):
            numbers = [f"{age[i]:.0f}", f"{lactate[i]:.2f}", f"{pressure[i]:.0f}"]
            measured = ["" if rng.random() < gap else x for x, gap in zip(numbers, (0.02, unmeasured, 0.05))]
            words = [("NA", sex[i])[rng.random() > 0.03], ward[i]]
            rows.append([hospital, *measured, *words, *(["yes" if died[i] else "no"] if target else [])])
    with pathlib.Path(path).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([HEADER if target else HEADER[:-1], *rows])


if __name__ == "__main__":
    write(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 0)
