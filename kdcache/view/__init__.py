"""The page of `kd view`."""
