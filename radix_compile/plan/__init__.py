"""What a batch shares: the prefix tree of its rows, and the arrays that folded programs read."""
