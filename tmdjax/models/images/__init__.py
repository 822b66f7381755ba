"""Networks of images: transformers, U-Net, classifier."""
