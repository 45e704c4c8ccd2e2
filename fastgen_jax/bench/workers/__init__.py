"""Programs that each measure one engine, in a process of its own: see `protocol`."""
