"""What cross-attention looks at: its maps, how well they follow the words of a prompt, and guidance by them."""
