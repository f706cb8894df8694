"""What any training loop needs: checkpoints, metrics, optimiser, state, reporting, interrupts."""
