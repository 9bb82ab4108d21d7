"""What all of MaskUNet's own errors have in common."""


class MaskUNetError(ValueError):
    """Something that a person can mend; the message is for them: what was wrong, where, and what to do."""

    # The host shows an error's module before its message, and a custom node's module is a long path.
    __module__ = "MaskUNet"

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.__module__ = MaskUNetError.__module__
