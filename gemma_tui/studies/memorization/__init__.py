"""How many bits a model has memorised of its training data, against a reference."""
