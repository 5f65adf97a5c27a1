"""What happens in every call: its plan, the checks of what was taken for granted, and which program runs."""
