"""Per-token statistics of large vocabularies: one pass, closed-form gradients."""
