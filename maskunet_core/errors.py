"""What all of MaskUNet's own errors have in common."""


class MaskUNetError(ValueError):
    """Something that a person can mend; the message is for them: what was wrong, where, and what to do."""
