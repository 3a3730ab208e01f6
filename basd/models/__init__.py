"Taps on any model, frozen teachers, students; this package's own models are registered with timm on import"
from . import last_layers, small_images
