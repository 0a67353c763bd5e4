"""What a model keeps of its training data: bits, membership, extraction and canaries."""
