"""What a model would need on a machine that is not here: estimates, and the device's compiler without the device."""
