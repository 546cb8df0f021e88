"""Networks: the Swin-UNETR, exchanging weights with the one of MONAI."""
