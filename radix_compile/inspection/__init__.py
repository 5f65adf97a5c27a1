"""What the passes did to a model, for people: views of graphs, their difference, and the pages that show it."""
