"""Agents in a world of many turns, so small that all seeds are trained at once."""
