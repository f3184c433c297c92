"""Couplings, conservation laws, the group action, and the flattest point of an orbit."""
