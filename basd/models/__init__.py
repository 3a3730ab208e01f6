"Taps on any model, frozen teachers, students; this package's own models are registered with timm on import"
from . import cifar_models, last_layers
