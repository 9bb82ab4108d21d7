"""Text2Video-Zero: frames of one picture that is moved, held together by attention to a common frame."""
