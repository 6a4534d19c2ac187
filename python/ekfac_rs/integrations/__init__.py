"""A learner in other libraries' training loops, one module for each; none is imported here."""
