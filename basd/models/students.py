import timm, torch, json
from pathlib import Path
from safetensors.torch import save_file, load_file
from .taps import Tapped
def create_student(model='deit_tiny_patch16_224', num_classes=10, img_size=None, patch_size=None, depth=None, width=None, heads=None, drop_path=0., pretrained=False, checkpoint=None, points=None, attention=True, **kwargs):
    args={k:v for k,v in dict(img_size=img_size,patch_size=patch_size,depth=depth,embed_dim=width,num_heads=heads,drop_path_rate=drop_path).items() if v is not None}|kwargs
    m=timm.create_model(model,pretrained=pretrained,num_classes=num_classes,**args)
    D=len(m.blocks); pts=[round((p+1)*D/12)-1 for p in (3,6,9,11)] if points is None else points
    c=timm.data.resolve_model_data_config(m); t=Tapped(m,sorted(set(pts)) if points is None else points,attention,c['mean'],c['std']); t.input_size=(3,img_size or 224,img_size or 224); t.architecture,t.model_args=model,args|{'num_classes':num_classes}
    return t
def save_student(t,path):
    path=Path(path); save_file(t.model.state_dict(), path/'student.safetensors'); (path/'student.json').write_text(json.dumps(dict(architecture=t.architecture,num_classes=t.model_args['num_classes'],model_args={k:v for k,v in t.model_args.items() if k!='num_classes'})))
def load_student(path,layers='all',attention=True):
    c=json.loads((Path(path)/'student.json').read_text()); m=c['model_args']; mm={'embed_dim':'width','num_heads':'heads','drop_path_rate':'drop_path'}
    t=create_student(c['architecture'],c['num_classes'],points=layers,attention=attention,**{mm.get(k,k):v for k,v in m.items()}); t.model.load_state_dict(load_file(Path(path)/'student.safetensors')); return t
