"""cpo-pipe: Contrastive Preference Optimization from ground-truth pairs alone (Feng et al. 2025)."""

__version__ = "0.1.0"
