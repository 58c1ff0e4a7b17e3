"""The page of `kd view`: what it shows of a cache (catalog, samples, texts), and the server that answers it."""
