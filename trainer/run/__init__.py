"""What every training run shares: arguments, checkpoints, processes."""
