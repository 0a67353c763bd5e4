"""What an experiment is, once for both engines and both fronts: no torch, no mlx, no Textual."""
