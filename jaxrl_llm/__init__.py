"""Objectives, bounds and training for LLM reinforcement learning in JAX."""
