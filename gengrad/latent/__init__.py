"""The bridge between molecules and flows: a latent cloud, and a surrogate of an objective as a potential on it.

``molecules/`` knows no flow, ``flows/`` and ``methods/`` know no molecule; this room encodes the ones into points that
the others move, and decodes what comes of it. Importing it registers the data set ``latents`` and the potential
``surrogate``.
"""

from gengrad.latent.data import Latents
from gengrad.latent.potential import SurrogatePotential

__all__ = ["Latents", "SurrogatePotential"]
