"""Rules of ops for the columns that entries read (``column_reach``)."""
