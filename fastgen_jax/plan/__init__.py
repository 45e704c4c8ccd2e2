"""What a model would need on a machine that is not here: arithmetic, and the real compiler without the device."""
