"""Words that are learned: vectors in the text encoder's input, for a subject, a style (Textual Inversion) or a relation
(ReVersion), alone or together with masks."""
