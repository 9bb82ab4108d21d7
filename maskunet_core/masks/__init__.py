"""The method: from logits to masks (Eq. 5), the masked layer (Eqs. 6, 7), generators (Eqs. 3, 4), logits in few bits,
and where masks come from.
"""
