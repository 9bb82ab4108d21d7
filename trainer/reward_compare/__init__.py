"""`python -m trainer reward-compare`: the search for masks beside its rivals, at equal compute, on the toy world."""
