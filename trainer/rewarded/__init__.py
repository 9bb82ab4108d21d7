"""Training on rewards: pictures that a run draws itself, of prompts alone, and what rewards say of them."""
