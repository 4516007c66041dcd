"""Training with timm models, data and optimisers. The only importer of timm."""
