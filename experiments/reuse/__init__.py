"""One batch reused in small worlds, without sampling: the parts of `divergence_chain`."""
