"""The doctor: checks of a run before it starts."""
