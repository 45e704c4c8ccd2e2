"""`python -m fastgen_jax.cli`."""

from fastgen_jax.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
