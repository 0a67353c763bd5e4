"""What goes wrong in a way the user can act on. Every message is one line: what, where, what to do."""


class EngineError(Exception):
    """Something the user can act on."""


class CheckpointError(EngineError):
    """A model or adapter on disk that is missing, broken, hostile or of an unknown kind."""


class UnsupportedError(EngineError):
    """An option or a model that is refused; the message gives the reason."""
