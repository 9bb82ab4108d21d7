"""Pictures with captions of the user's own: found, sorted into aspect ratios, encoded once and kept on disk."""
