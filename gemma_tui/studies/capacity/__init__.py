"""How many bits small networks hold of random tokens."""
