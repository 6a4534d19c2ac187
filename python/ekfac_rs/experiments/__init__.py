"""Continual-learning experiments: ``python -m ekfac_rs.experiments --help``."""
