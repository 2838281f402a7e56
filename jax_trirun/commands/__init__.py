"""One file a command of `python -m jax_trirun`."""
