"""What only a card can tell: `make gpu`. See README.md in this folder."""
