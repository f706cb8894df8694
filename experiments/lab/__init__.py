"""Training under a controlled mismatch: the parts that `trm_training` and `pruning_training` share."""
