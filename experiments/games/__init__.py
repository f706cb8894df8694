"""Actor-critics in games: the parts of `divergence_minatar` and `divergence_atari`."""
