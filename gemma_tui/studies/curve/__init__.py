"""How speed and quality of block decoding go together, over a data set."""
