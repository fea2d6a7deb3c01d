"""The training loop with its loss and optimizer, several processes, and held-out evaluation."""
