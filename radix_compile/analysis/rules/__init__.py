"""The rules of ops, which derive the axes and facts of results. The table of ops (``op_table``) refers to them."""
