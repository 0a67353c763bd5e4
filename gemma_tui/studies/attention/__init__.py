"""Looking inside a text: one file per view, each a generator of the share done that returns a figure."""
