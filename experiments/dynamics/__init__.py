"""How far one update moves the logits of a policy that learns: the parts of `logit_dynamics_training`."""
