"""Tracking in other people's training loops; each module imports its package, and is imported on request only."""
