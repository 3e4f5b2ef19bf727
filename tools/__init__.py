"""Scripts that people run by hand: front-end parts, pictures for the docs."""
