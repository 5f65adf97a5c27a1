"""What ops do to the columns that entries read (``column_reach``)."""
