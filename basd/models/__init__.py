"Taps on any model, frozen teachers, students; models for small images are registered with timm on import"
from . import small_images
