"""What is true of an op or a graph: rules, how far columns read, attention, masks, bounds, costs."""
