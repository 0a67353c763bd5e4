"""One file per screen, thin: each dispatches to a study and reads runs."""
