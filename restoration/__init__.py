"""Restoring images: the trained model, BM3D beside it, and what is written."""

from pathlib import Path

RESEARCH_USE = "research use only: a restored image is an estimate, not fit for diagnosis"
# the model in the box: trained on the first 72 images of mini-MIAS and on phantoms; see weights/README.md
SHIPPED_VQVAE, SHIPPED_DIFFUSION, SHIPPED_CALIBRATION = (
    Path(__file__).resolve().parents[1] / "weights" / name for name in ("vqvae.pt", "diffusion.pt", "uncertainty.json")
)
