"""What made the shipped files, the figures and the tables: one module each, run as ``python -m experiments.NAME``."""
