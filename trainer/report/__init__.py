"""The page of `kd report`."""
