"""What passes say to each other: the meaning of dimensions, what is known of values, and verdicts."""
