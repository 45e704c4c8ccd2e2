"""The CPU backend of ragged attention: a native kernel in C++."""
