"""What ops do to the meaning of dimensions: the rules that the rows of the table (``op_table``) name."""
