"""Models: which are here, what a name means, import."""
