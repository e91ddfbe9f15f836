"""Evaluation: distances between sets of pictures, reported beside two anchors."""
