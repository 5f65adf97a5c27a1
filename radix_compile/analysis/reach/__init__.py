"""Rules of ops for the last column that each entry reads (``column_reach``)."""
