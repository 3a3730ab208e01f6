import torch
from torch import nn
from ..geometry.resampling import resample_attention
def cut_attention(A, A_partner, keep):
    own=A*keep; own=own/own.sum(-1,keepdim=True).clamp(min=1e-8); o=A_partner*(1-keep); o=o/o.sum(-1,keepdim=True).clamp(min=1e-8)
    m=keep[:,None]; return m*own+(1-m)*o
class AttentionKL(nn.Module):
    def __init__(self, heads_s, heads_t, normalise:str='row', learn_temperature:bool=False, reduction:str='row', rows:int|None=None):
        super().__init__(); self.heads_t,self.E=heads_t,len(heads_s)
        self.w=nn.Parameter(torch.full((self.E*heads_t,sum(heads_s)),1/sum(heads_s))+.01*torch.randn(self.E*heads_t,sum(heads_s)))
    def target(self, attention_t, weights, n_outs, grids_t=None, grids_s=None, rows=None):
        acc=None
        for l,a in enumerate(attention_t):
            A=a.weights(); acc=[w[l]*A for w in weights] if acc is None else [c.add(w[l]*A) for c,w in zip(acc,weights)]
        return [resample_attention(c,n,grids_t[0],g) for c,n,g in zip(acc,n_outs,grids_s)]
    def forward(self, attention_s, target):
        S=torch.cat([a.logits() for a in attention_s],1)
        Z=torch.einsum('oh,bhij->boij',self.w,S).log_softmax(-1).unflatten(1,(self.E,-1))
        return torch.stack([(torch.special.xlogy(t,t)-t*Z[:,e]).sum(-1).mean() for e,t in enumerate(target)]).mean()
