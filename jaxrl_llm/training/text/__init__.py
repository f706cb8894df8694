"""Training a language model: layout, signals, update, loop."""
