"""The vocabulary of the passes: the meaning of dimensions, facts about values and graphs, and verdicts."""
