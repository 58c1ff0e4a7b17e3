"""Write the page of `kd report`."""
