"""Views of graphs for people, their differences, and the pages that show them."""
