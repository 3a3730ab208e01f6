import timm, torch
from safetensors.torch import load_file
from .taps import Tapped
class Frozen(Tapped):
    def train(self, mode=True): return super().train(False)
    @torch.no_grad()
    def forward(self, x): return super().forward(x)
def frozen(t): t.__class__=Frozen; t.eval(); t.requires_grad_(False); return t
def create_teacher(model, pretrained=False, checkpoint=None, img_size=None, num_classes=None, layers='all', attention=True, **kwargs):
    if img_size: kwargs['img_size']=img_size
    m=timm.create_model(model,pretrained=pretrained,**({'num_classes':num_classes} if num_classes is not None else {}),**kwargs)
    if checkpoint:
        sd=load_file(checkpoint); 
        sd=timm.models.vision_transformer.checkpoint_filter_fn(sd,m); m.load_state_dict(sd)
    c=timm.data.resolve_model_data_config(m); t=Tapped(m,layers,attention,c['mean'],c['std']); t.input_size=(3,img_size or c['input_size'][1],)*1+(img_size or c['input_size'][1],)
    return frozen(t)
