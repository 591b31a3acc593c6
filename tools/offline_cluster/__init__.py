"""A kind cluster built without pulling an image; README.md says when, why and how."""
