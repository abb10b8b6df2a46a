"""Restoring images: the trained model, BM3D beside it, and what is written."""

RESEARCH_USE = "research use only: a restored image is an estimate, not fit for diagnosis"
