"""Graphs before and after folding, as text, HTML pages and traces."""
