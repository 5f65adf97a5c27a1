"""Attention as the op ``radix::tree_attention`` takes it: what is read of a captured one, and what of it is carried."""
