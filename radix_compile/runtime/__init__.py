"""Everything that happens in every call: its plan, the checks of assumptions, the choice of a program."""
