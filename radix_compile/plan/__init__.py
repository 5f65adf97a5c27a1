"""The prefix tree of a batch, and the arrays about it that folded programs read."""
