"""Facts about ops and graphs: rules, how far columns read, attention, masks, bounds, costs."""

from radix_compile.analysis import op_table  # noqa: F401 - fills OP_INFO before it is used
