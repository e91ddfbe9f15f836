"""How good is it: distances between sets of pictures, always beside two anchors."""
