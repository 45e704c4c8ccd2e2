"""The sampler of the step program, and the user's function before it: logits in, tokens and log-probabilities out."""
