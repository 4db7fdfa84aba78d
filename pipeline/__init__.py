"""Chest X-ray vision-language pre-training, from raw archives to Tables 1-4 of CXR-CLIP."""
