"""Fits the networks of a method's stages; knows no concrete method."""
