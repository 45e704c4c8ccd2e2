"""A JAX that cannot be imported, as after an upgrade of a library that it needs."""

raise ImportError("libmissing.so.9: cannot open shared object file")
