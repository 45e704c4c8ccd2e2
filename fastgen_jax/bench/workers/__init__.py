"""Programs that each measure one engine in its own process: see `protocol`."""
