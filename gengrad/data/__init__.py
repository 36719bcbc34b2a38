"""Where mass starts and ends: toy densities, Gaussians, digits, arrays; importing this registers them all."""
