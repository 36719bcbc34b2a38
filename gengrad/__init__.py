"""gengrad: train, sample and steer generative models by Wasserstein gradient flows."""

__version__ = "0.1.0"
