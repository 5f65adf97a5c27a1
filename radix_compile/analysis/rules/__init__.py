"""The meaning of dimensions through ops: the rules that the rows of the table (``op_table``) name."""
