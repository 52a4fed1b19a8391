"""The building blocks of a round: types, trees, cohorts, losses, checks. They know no algorithm."""
