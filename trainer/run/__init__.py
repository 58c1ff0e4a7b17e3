"""What `kd train` and `kd grpo` share: the folder of a run, its record, its checkpoints, its options, its processes."""
