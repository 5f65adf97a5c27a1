"""Captured attentions in terms of the op ``radix::tree_attention``: their operands, masks and biases."""
