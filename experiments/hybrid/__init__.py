"""Imitation and reinforcement in Rooms, where everything is exact: the parts of `hybrid_imitation_rl`."""
