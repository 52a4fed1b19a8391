"""What a round is made of: types, trees, cohorts, losses, checks. Knows no algorithm."""
