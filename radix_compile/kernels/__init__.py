"""Index ops (and, in time, attention) on the prefix tree."""
