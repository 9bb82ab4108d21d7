"""The embedded toy world: a small real text-to-image model of coloured shapes, and readers of its pictures."""
